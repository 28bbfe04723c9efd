"""Backbones, registered under the scope ``mmsoft``."""

from .sequence import SequenceSOFT, SequenceSOFTPlusPlus
from .soft import SOFT, SOFTPlusPlus

__all__ = ["SOFT", "SOFTPlusPlus", "SequenceSOFT", "SequenceSOFTPlusPlus"]
