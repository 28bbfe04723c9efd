"""Data sets that OpenMMLab has not."""

from .long_range_arena import AANRetrieval, GreyCIFAR10, IMDbBytes, ListOps, Pathfinder32

__all__ = [
    "AANRetrieval",
    "GreyCIFAR10",
    "IMDbBytes",
    "ListOps",
    "Pathfinder32",
]
