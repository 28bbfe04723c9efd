"""Modules built on :mod:`mmsoft.ops`, and the backbones made of them."""

from mmsoft import integration

from .backbones import SOFT, SequenceSOFT, SequenceSOFTPlusPlus, SOFTPlusPlus
from .preprocessor import SequencePreprocessor

integration.check_libraries()
integration.register_flop_counters()

__all__ = ["SOFT", "SOFTPlusPlus", "SequencePreprocessor", "SequenceSOFT", "SequenceSOFTPlusPlus"]
