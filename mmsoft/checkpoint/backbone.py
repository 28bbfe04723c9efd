"""Loading a backbone from any checkpoint that contains one."""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import summary
from .reading import read_checkpoint
from .released import convert_released, is_released


def load_backbone(
    backbone: Any, checkpoint: str, prefix: str | None = None, map_location: Any = "cpu"
) -> None:
    """Load a backbone from a released file, or from any checkpoint that contains such a backbone.

    Unlike MMEngine's ``Pretrained``, which logs what does not fit and goes on, every parameter must
    be found and fit. What is left out on purpose (stages that ``out_indices`` does not build, heads
    and necks) is counted in one line of the log, see :class:`LoadReport`.

    Args:
        backbone: a SOFT or SOFT++ backbone, of images or sequences.
        checkpoint: see :func:`read_checkpoint`.
        prefix: what precedes the backbone's names in the checkpoint, e.g. ``'backbone.'``; found if
            not given.
        map_location: as in :func:`torch.load`.

    Raises:
        ValueError: the file is refused, has no such backbone, or another architecture or variant.
        RuntimeError: parameters are missing, unexpected, or of another shape.
    """
    content, weights, prefix, own = _read_backbone(backbone, checkpoint, prefix, map_location)
    stages = len(getattr(backbone, "stages", ()))
    later = [k for k in own if (m := re.match(r"stages\.(\d+)\.", k)) and int(m[1]) >= stages]
    if not hasattr(backbone, "norm"):
        later += [name for name in own if name.startswith("norm.")]
    for name in later:
        del own[name]
    try:
        missing, unexpected = backbone.load_state_dict(own, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"{checkpoint}: {error}") from None
    finally:
        report, backbone.load_report = backbone.load_report, None
    problems = [
        f"{len(names)} {what}: {summary(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise RuntimeError(f"{checkpoint} does not fit the backbone; {'; '.join(problems)}")
    meta = content.get("meta")
    released = meta.get("released") if isinstance(meta, dict) else None
    source = released.get("weights") if isinstance(released, dict) else None
    origin = f" (released, {source})" if isinstance(source, str) else ""
    report.not_built += [prefix + name for name in later]
    report.left_out += [name for name in weights if not name.startswith(prefix)]
    report.write(f"{checkpoint}{origin}")


def foresee_backbone(backbone: Any, checkpoint: str, prefix: str | None = None, **_: Any) -> None:
    """Let a backbone become what weights in a local file ask for, without loading them.

    What copies a model before it is initialized, as MMEngine's EMAHook does, then has a copy of the
    same kind. A file that is not there, or that loading will refuse, changes nothing.
    """
    if not Path(checkpoint).is_file():
        return
    with contextlib.suppress(OSError, RuntimeError, TypeError, ValueError):
        own: Any = _read_backbone(backbone, checkpoint, prefix, "cpu")[3]
        noted = own._metadata.get("")
        backbone.match_weights(own, "", noted if isinstance(noted, dict) else {})


def _read_backbone(
    backbone: Any, checkpoint: str, prefix: str | None, map_location: Any
) -> tuple[Any, dict, str, OrderedDict]:
    """The file, its weights, the prefix of the backbone's, and these under their own names."""
    content = read_checkpoint(checkpoint, map_location)
    if is_released(content):
        content = convert_released(content)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{checkpoint} must hold a dict of tensors by name")
    prefix = _find_prefix(weights, prefix, checkpoint, backbone.mark)
    metadata = getattr(weights, "_metadata", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    own = OrderedDict((k[len(prefix) :], v) for k, v in weights.items() if k.startswith(prefix))
    own._metadata = {  # type: ignore[attr-defined]
        f"{k}."[len(prefix) :].rstrip("."): v
        for k, v in metadata.items()
        if f"{k}.".startswith(prefix)
    }
    return content, weights, prefix, own


def _find_prefix(weights: Mapping[str, Any], prefix: str | None, source: str, mark: str) -> str:
    found = sorted(k.removesuffix(mark) for k in weights if re.search(rf"(^|\.){mark}$", k))
    if prefix is not None:
        prefix = prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
        if prefix in found:
            return prefix
    elif len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{source} holds no SOFT backbone; its keys are {summary(map(str, weights))}"
        )
    raise ValueError(
        f"{source} holds backbones under {found}, the prefix given is {prefix!r}; "
        "name one in init_cfg, as prefix=..."
    )
