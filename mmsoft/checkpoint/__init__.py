"""Checkpoints: the authors' released files, safe reading, loading into a backbone."""

from .backbone import foresee_backbone, load_backbone
from .checks import check_arch, check_is_ours, check_tensors, infer_arch
from .reading import read_checkpoint
from .released import convert_released, convert_released_keys, is_released
from .report import LoadReport

__all__ = [
    "LoadReport",
    "check_arch",
    "check_is_ours",
    "check_tensors",
    "convert_released",
    "convert_released_keys",
    "foresee_backbone",
    "infer_arch",
    "is_released",
    "load_backbone",
    "read_checkpoint",
]
