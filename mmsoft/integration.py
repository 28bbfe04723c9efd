"""What has to be registered with the packages around, and why; and their versions.

Nothing here changes what other models, configs or checkpoints do. What replaces a part of MMEngine
is asked for by name instead: ``mmsoft.CheckpointHook`` and :mod:`mmsoft.checkpoint.loader`.
"""

import sys
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Import name -> (distributions that provide it, versions). From torch 2.6 on loading a checkpoint
# runs no code from it, and safe globals can be named (see allow_mmengine_checkpoints); mmdet and
# mmseg refuse mmcv 2.2.
CORE_DEPENDENCIES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), ">=2.6"),
    "mmengine": (("mmengine", "mmengine-lite"), ">=0.10.4,<1.0"),
    "mmcv": (("mmcv", "mmcv-lite"), ">=2.0.0,<2.2.0"),
}


def check_versions() -> None:
    """Check that every core dependency is installed in a version that works.

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


def allow_mmengine_checkpoints() -> None:
    """Let torch load the checkpoints that MMEngine writes.

    Since torch 2.6 ``torch.load`` accepts only listed globals, and MMEngine (up to 0.10.7) neither
    lists what its message hub pickles nor asks for the old behaviour, so it cannot resume or test
    from its own files (open-mmlab/mmengine issue 1655). The list here is what such files need and
    no more: the history buffer with its four statistics, and NumPy arrays and scalars of numbers,
    each of them made by a stand-in that takes no more than is stored.
    """
    import torch

    from mmsoft.unpickling import safe_globals

    torch.serialization.add_safe_globals(safe_globals())


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
