"""Modules built on :mod:`mmsoft.ops`, and the backbones made of them."""

from .backbones import SOFT, SOFTPlusPlus

__all__ = ["SOFT", "SOFTPlusPlus"]
