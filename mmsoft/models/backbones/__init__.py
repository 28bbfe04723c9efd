"""Backbones, registered under the scope ``mmsoft``."""

from .soft import SOFT, SOFTPlusPlus

__all__ = ["SOFT", "SOFTPlusPlus"]
