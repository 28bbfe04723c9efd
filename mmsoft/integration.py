"""Registration with other packages, and why it is needed; checks of their versions.

Nothing here changes what other models, configs or checkpoints do. What replaces a part of MMEngine
is enabled by name instead: ``mmsoft.CheckpointHook`` and :mod:`mmsoft.checkpoint.loader`.
"""

import importlib.abc
import sys
from difflib import get_close_matches
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from mmsoft.installed import (
    check_version,
    error_type,
    installed_version,
    is_before,
    is_called_by,
)
from mmsoft.safe_globals import RESTRICTED, safe_globals

# Import name -> (distributions that provide it, versions). mmdet and mmseg refuse mmcv 2.2.
CORE_DEPENDENCIES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("torch",), ">=2.1"),
    "mmengine": (("mmengine", "mmengine-lite"), ">=0.10.4,<1.0"),
    "mmcv": (("mmcv", "mmcv-lite"), ">=2.0.0,<2.2.0"),
}

# Checked once they are in use: those installed beside need not be ours.
LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "mmdet": (("mmdet",), ">=3.3,<3.4"),
    "mmseg": (("mmsegmentation",), ">=1.2,<1.3"),
    "mmpretrain": (("mmpretrain",), ">=1.2,<1.3"),
}
NEED_OPERATORS = ("mmdet", "mmseg")  # of mmcv, compiled
NUMPY_1 = "'numpy<2' 'opencv-python<4.12'"  # OpenCV 4.12 asks for NumPy 2


def check_versions() -> None:
    """Check that every core dependency is installed in a supported version, and NumPy for torch.

    Only package metadata is read; nothing is imported.

    Raises:
        ImportError: a core dependency is missing or out of range. The message names the version
            found and the range wanted. (A RuntimeError with the same message if MMEngine's
            registry or ``custom_imports`` is importing the package: it hides import errors.)
    """
    for name, (distributions, wanted) in CORE_DEPENDENCIES.items():
        check_version(name, distributions, wanted, _mmcv_command() if name == "mmcv" else "")
    torch, numpy = installed_version(("torch",)), installed_version(("numpy",))
    if numpy and is_before(torch, "2.3") and not is_before(numpy, "2"):
        raise error_type()(
            f"torch {torch} works with NumPy 1 alone, but numpy {numpy} is installed: "
            f"pip install {NUMPY_1}"
        )


def check_libraries() -> None:
    """Check the OpenMMLab libraries that are imported.

    Raises:
        ImportError: see :func:`check_library`.
    """
    for name in LIBRARIES:
        if sys.modules.get(name):
            check_library(name)


def check_library(name: str) -> None:
    """Check an OpenMMLab library's version, and that what it imports is there.

    Args:
        name: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.

    Raises:
        ImportError: it is out of range; mmcv has no operators, which MMDetection and MMSegmentation
            import; there is no torchvision, which MMPreTrain imports, or that of another torch. The
            message has the command that helps. (A RuntimeError as in :func:`check_versions`.)
    """
    check_version(name, *LIBRARIES[name])
    if name in NEED_OPERATORS and not _mmcv_has_operators():
        raise error_type()(
            f"{name} needs mmcv with its compiled operators, and the mmcv that is installed "
            f"has none.{_mmcv_command()}"
        )
    if name == "mmpretrain":
        _check_torchvision()


def _check_torchvision() -> None:
    torch = Version(installed_version(("torch",)) or "0")
    found = installed_version(("torchvision",))
    # torch 2.1.2 and torchvision 0.16.2, and so on. Vendors build their own pairs from between.
    fitting = f"==0.{torch.minor + 15}.{torch.micro}" if torch.major == 2 else ""
    if found is None:
        problem = "which is not installed"
    elif fitting and Version(found).minor != torch.minor + 15 and not torch.is_prerelease:
        problem = f"but {found} is of another torch than {torch}"
    else:
        return
    raise error_type()(
        f"mmpretrain needs torchvision, {problem}. For this torch: pip install torchvision{fitting}"
    )


def _mmcv_has_operators() -> bool:
    try:
        files = metadata.files("mmcv") or []
    except metadata.PackageNotFoundError:  # mmcv-lite
        return False
    names = {str(file) for file in files}
    # A development install has no list of its modules: it is taken to be complete.
    return "mmcv/__init__.py" not in names or any(name.startswith("mmcv/_ext") for name in names)


def _mmcv_command() -> str:
    torch = installed_version(("torch",))
    if is_before(torch, "2.2"):  # the last with prebuilt mmcv 2.1
        return (
            " For this torch it is prebuilt: pip uninstall -y mmcv mmcv-lite; pip install "
            f"'openmim>=0.3.9' 'setuptools>=77.0.3,<80' 'opendatalab<0.0.10' {NUMPY_1} && "
            "mim install mmcv==2.1.0"
        )
    return (
        f" For torch {torch} it has to be compiled, with gcc, and nvcc for CUDA: pip uninstall -y "
        "mmcv mmcv-lite; pip install setuptools==79.0.1 wheel ninja; MMCV_WITH_OPS=1 pip install "
        "--no-build-isolation --no-cache-dir mmcv==2.1.0"
    )


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
    from its own files (open-mmlab/mmengine issue 1655). Before, MMEngine loads anything.
    """
    if RESTRICTED:
        torch.serialization.add_safe_globals(safe_globals())


class _InferencersKnowOurNames(importlib.abc.MetaPathFinder):
    """Once MMEngine's inferencers are imported, which takes seconds, adds to what they look up."""

    module = "mmengine.infer.infer"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # not before: an import can fail, and be repeated
                    sys.meta_path.remove(self)
                _add_names(module.BaseInferencer)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_names() -> None:
    """Let MMDetection's and MMSegmentation's inferencers find our configs by name.

    They look in the model index of their own library; what that has is left to it.
    """
    if module := sys.modules.get(_InferencersKnowOurNames.module):
        _add_names(module.BaseInferencer)
    elif not any(isinstance(finder, _InferencersKnowOurNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _InferencersKnowOurNames())


def _add_names(inferencer: Any) -> None:
    theirs = inferencer._load_model_from_metafile

    @wraps(theirs)
    def load(self: Any, model: str) -> tuple[Any, str | None]:
        try:
            return theirs(self, model)
        except ValueError as error:
            from mmengine.config import Config

            files = Path(__file__).with_name(".mim").glob("configs/*/*.py")
            ours = {file.stem: file for file in files}
            name = Path(model.rpartition("::")[2]).name.lower().removesuffix(".py")
            if name not in ours:
                near = get_close_matches(name, ours, n=1)
                raise ValueError(
                    f"{error}, nor among mmsoft's configs"
                    + (f", which have {near[0]}" if near else "")
                ) from None
            config = Config.fromfile(ours[name])
            if (scope := config.get("default_scope")) != self.scope:
                raise ValueError(
                    f"{model} is a config of {scope}, not of {self.scope}: use the inferencer of "
                    f"{scope}"
                ) from None
            return config, None

    inferencer._load_model_from_metafile = load


def announce_missing_weights() -> None:
    """Say in `mim download`, which reads the configs that it copies, why it fetches nothing."""
    if is_called_by("mim/commands/download.py"):  # mim executes it as text, without a name
        print(
            "mmsoft publishes no weights; those that the authors released are linked from "
            "https://github.com/fudan-zvg/SOFT"
        )


def register_flop_counters() -> None:
    """Let the ``get_flops`` of every library count our operators, which MMEngine does not know."""
    from mmengine.analysis import complexity_analysis

    from mmsoft.flops import HANDLES

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)
