"""Command line, config and model: code that the tools share."""

import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmsoft.installed import check_version, installed_version

# Ours that bring a package; else peers.
_EXTRAS = dict(
    mmdet="det",
    mmseg="seg",
    mmpretrain="cls",
    onnx="deploy",
    onnxruntime="deploy",
    onnxscript="deploy",
    flask="explore",
    waitress="explore",
    matplotlib="explore",
)
# Those of which the extras ask for a version -> (distributions that provide it, versions).
_VERSIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnx": (("onnx",), ">=1.23"),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"), ">=1.32"),
    "onnxscript": (("onnxscript",), ">=0.7"),
    "flask": (("flask",), ">=3"),
    "waitress": (("waitress",), ">=3"),
}


def require(package: str) -> None:
    """Check that an optional package is installed, in a version that its extra asks for.

    Raises:
        ImportError: it is missing or out of range; the message says how to install it.
    """
    command = f"pip install 'mmsoft[{_EXTRAS.get(package, 'peers')}]'"
    if find_spec(package) is None:
        raise ImportError(f"{package} is missing: {command}")
    distributions, wanted = _VERSIONS.get(package, ((), ""))
    if installed_version(distributions):  # else it comes from elsewhere, and does not say
        check_version(package, distributions, wanted, f" {command}")


def config_parser(description: str | None) -> ArgumentParser:
    """A command line with a config and changes to it, for :func:`read_config`."""
    parser = ArgumentParser(description=description and description.splitlines()[0])
    parser.add_argument("config", help="config of a classifier, detector or segmentor")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="key=value changes")
    return parser


def add_shape(parser: ArgumentParser) -> None:
    """Let ``--shape`` set (height, width)."""
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        action=_Shape,
        default=(224, 224),
        help="height and width, or one number for both (default: 224)",
    )


class _Shape(Action):
    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *_: Any) -> None:
        if len(values) > 2 or min(values) < 1:
            parser.error(f"--shape takes one or two positive numbers, got {values}")
        setattr(namespace, self.dest, (values[0], values[-1]))


def tool_main(main: Callable[[], None]) -> Callable[[], int]:
    """Return an exit status from a tool's ``main``; errors that the user can fix are one line."""

    @wraps(main)
    def run() -> int:
        try:
            main()
        except (ImportError, OSError, ValueError) as error:
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
            return 1
        return 0

    return run


def read_config(args: Namespace) -> Config:
    """The config that a :func:`config_parser` was given, with its changes."""
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    return config


def build_model(config: Config, part: str | None = None) -> Any:
    """Build a config's model for one process, without loading weights.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        part: build this entry of ``config.model`` alone, e.g. ``'backbone'``.

    Returns:
        The ``nn.Module``; its attributes depend on the library.
    """
    init_default_scope(config.get("default_scope", "mmengine"))
    wanted: Any = ConfigDict(config.model[part] if part else config.model)
    if part is None:
        wanted.setdefault("data_preprocessor", config.get("data_preprocessor"))
    return revert_sync_batchnorm(MODELS.build(wanted))
