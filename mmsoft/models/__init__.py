"""Modules built on :mod:`mmsoft.ops`, and the backbones made of them."""

import mmsoft.engine  # noqa: F401  (every run with our models then saves whole checkpoints)
from mmsoft import flops

from .backbones import SOFT, SOFTPlusPlus

flops.register()  # here, so that the get_flops of every library counts our operators

__all__ = ["SOFT", "SOFTPlusPlus"]
