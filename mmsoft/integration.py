"""Registration with other packages, and why it is needed; checks of their versions.

Nothing here changes what other models, configs or checkpoints do. What replaces a part of MMEngine
is enabled by name instead: ``mmsoft.CheckpointHook`` and :mod:`mmsoft.checkpoint.loader`.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import metadata
from pickle import UnpicklingError

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Import name -> (distributions that provide it, versions). From torch 2.6 on loading a checkpoint
# runs no code from it, and safe globals can be named (see allow_checkpoints); mmdet and
# mmseg refuse mmcv 2.2.
CORE_DEPENDENCIES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), ">=2.6"),
    "mmengine": (("mmengine", "mmengine-lite"), ">=0.10.4,<1.0"),
    "mmcv": (("mmcv", "mmcv-lite"), ">=2.0.0,<2.2.0"),
}


def check_versions() -> None:
    """Check that every core dependency is installed in a supported version.

    Only package metadata is read; nothing is imported.

    Raises:
        ImportError: a core dependency is missing or out of range. The message names the version
            found and the range wanted. (A RuntimeError with the same message if MMEngine's
            registry is importing the package, because it hides import errors.)
    """
    for name, (distributions, wanted) in CORE_DEPENDENCIES.items():
        found = _installed_version(distributions)
        if found is None:
            raise _error_type()(f"mmsoft needs {name}{wanted}, but {name} is not installed.")
        # Without suffixes: 2.13.0+cpu and vendors' 2.6.0a0+git are what they are builds of.
        if not SpecifierSet(wanted).contains(Version(found).base_version):
            raise _error_type()(f"mmsoft needs {name}{wanted}, but {name} {found} is installed.")


def register_config_prefix() -> None:
    """Let ``_base_ = 'mmsoft::folder/name.py'`` resolve once the package is imported."""
    from mmengine.config.utils import MODULE2PACKAGE

    # MMEngine looks for `.mim` in the folder of an installed distribution, which for an editable
    # install is site-packages/mmsoft and does not exist. Given the name of a module instead, it
    # falls back to that module's own folder, which is right for every kind of install.
    MODULE2PACKAGE.setdefault("mmsoft", "mmsoft.version")


def allow_checkpoints() -> None:
    """Let torch load the checkpoints that MMEngine writes, and those of the authors.

    Since torch 2.6 ``torch.load`` accepts only listed globals, and MMEngine (up to 0.10.7) neither
    lists what its message hub pickles nor requests the old behaviour, so it cannot resume or test
    from its own files (open-mmlab/mmengine issue 1655). The list here is what such files need and
    no more: the history buffer with its four statistics, and NumPy arrays and scalars of numbers.
    Released files need ``argparse.Namespace``, which only holds attributes.
    """
    import numpy as np
    import torch
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
    torch.serialization.add_safe_globals([*classes, *dtypes, *rebuilders, statistic])


def _history_statistic(owner: type, name: str) -> Callable[..., float]:
    """Replace `getattr` in the pickle of a history buffer, which looks up its methods.

    The real `getattr` in the list would let a crafted file reach any attribute of listed objects.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(f"refused getattr of a {type(owner).__name__} in a checkpoint")


def register_flop_counters() -> None:
    """Let the ``get_flops`` of every library count our operators, which MMEngine does not know."""
    from mmengine.analysis import complexity_analysis

    from mmsoft.flops import HANDLES

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)


def _installed_version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _error_type() -> type[Exception]:
    # `type='mmsoft.X'` makes MMEngine import us inside a `try` that drops ImportErrors; the user
    # would only read that X is not registered.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "mmengine.registry.registry":
            return RuntimeError
        frame = frame.f_back  # type: ignore[assignment]
    return ImportError
