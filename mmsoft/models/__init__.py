"""Modules built on :mod:`mmsoft.ops`, and the backbones made of them."""

from mmsoft import flops

from .backbones import SOFT, SOFTPlusPlus

flops.register()  # here, so that the get_flops of every library counts our operators

__all__ = ["SOFT", "SOFTPlusPlus"]
