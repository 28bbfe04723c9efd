"""What a checkpoint may name beside tensors and plain values, and reading it on older torch."""

import argparse
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version

RESTRICTED = Version(Version(torch.__version__).base_version) >= Version("2.6")


def safe_globals() -> list:
    """What the files of MMEngine and of the authors need, as ``add_safe_globals`` takes it.

    And no more: the history buffer with its four statistics, NumPy arrays and scalars of numbers,
    and ``argparse.Namespace``, which only holds attributes.
    """
    import numpy as np
    from mmengine.logging import HistoryBuffer

    # Where NumPy 2 keeps the functions that rebuild arrays and scalars, and where NumPy 1 did.
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    rebuilders = [
        (getattr(multiarray, function), f"numpy.{core}.multiarray.{function}")
        for function in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    statistic = (_history_statistic, "builtins.getattr")
    classes = [argparse.Namespace, HistoryBuffer, np.ndarray, np.dtype]
    return [*classes, *dtypes, *rebuilders, statistic]


def _history_statistic(owner: type, name: str) -> Callable[..., float]:
    """Replace `getattr` in the pickle of a history buffer, which looks up its methods.

    The real `getattr` in the list would let a crafted file reach any attribute of listed objects.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"refused getattr of a {type(owner).__name__} in a checkpoint")


@cache
def _allowed() -> dict[str, Any]:
    """What torch 2.6 and :func:`safe_globals` allow, for torch before 2.6: name -> object."""
    from torch._weights_only_unpickler import _get_allowed_globals

    kinds = (torch.dtype, torch.qscheme)
    allowed = {
        **_get_allowed_globals(),
        **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, kinds)},
        "torch._utils._rebuild_qtensor": torch._utils._rebuild_qtensor,
        "_codecs.encode": __import__("_codecs").encode,
        "builtins.bytearray": bytearray,
        "builtins.complex": complex,
        "builtins.set": set,
        "collections.Counter": Counter,
        "torch.device": torch.device,
    }
    for entry in safe_globals():
        known = entry if isinstance(entry, tuple) else (entry, None)
        allowed[known[1] or f"{known[0].__module__}.{known[0].__qualname__}"] = known[0]
    return allowed


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")  # as Python 2 named it
        if full not in _allowed():
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full}")
        return _allowed()[full]


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = SimpleNamespace(__name__="mmsoft", Unpickler=_Unpickler, load=_load)


def load(path: str, map_location: Any, mmap: bool = False) -> Any:
    """``torch.load`` that runs no code from the file, on any torch; it has passed ``ClaimCheck``.

    Before torch 2.6 with a warning, once, for what does not come here.

    Raises:
        UnpicklingError: the file names what is not allowed.
    """
    if RESTRICTED:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    _warn()
    return torch.load(path, map_location=map_location, pickle_module=_PICKLE, mmap=mmap)


def warn_of_other_loaders() -> None:
    """Warn, once, where MMEngine reads local checkpoints itself and torch does not protect."""
    from mmengine.runner.checkpoint import CheckpointLoader

    loader = CheckpointLoader._schemes.get("")
    if not RESTRICTED and getattr(loader, "__module__", "") != "mmsoft.checkpoint.loader":
        _warn()


@cache
def _warn() -> None:
    warnings.warn(
        f"torch {torch.__version__} does not protect against checkpoints that run code when they "
        "are loaded: MMEngine loads without weights_only, and before torch 2.6 that can be got "
        "round (CVE-2025-32434). mmsoft reads checkpoints by a list of what they may hold, "
        "wherever mmsoft.checkpoint reads them and in no other place: load only files that you "
        "trust, import mmsoft.checkpoint.loader, by which MMEngine loads then, or update torch",
        stacklevel=4,
    )
