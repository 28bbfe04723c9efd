"""The published architectures, and the checks of a backbone's arguments."""

from collections.abc import Sequence
from typing import Any

# SOFT++ (arXiv 2207.03341), table 2. Small's stage 3 has 7 blocks: the release says 20, which fits
# neither the published parameters nor those of the detectors.
ARCHS: dict[str, dict[str, list[int]]] = {
    "tiny": dict(embed_dims=[64, 128, 320, 512], depths=[1, 2, 3, 2], num_heads=[2, 4, 10, 16]),
    "small": dict(embed_dims=[64, 128, 320, 512], depths=[1, 3, 7, 4], num_heads=[2, 4, 10, 16]),
    "medium": dict(embed_dims=[64, 128, 288, 512], depths=[1, 3, 29, 5], num_heads=[2, 4, 9, 16]),
    "large": dict(embed_dims=[64, 128, 320, 512], depths=[1, 3, 40, 5], num_heads=[2, 4, 10, 16]),
    "huge": dict(embed_dims=[64, 128, 352, 512], depths=[1, 5, 49, 5], num_heads=[2, 4, 11, 16]),
}
ARCH_ALIASES = {name[0]: name for name in ARCHS}
STAGES = 4
STRIDES = (4, 8, 16, 32)  # of the features, by stage
_OPTIONAL = dict(landmark_strides=[8, 4, 2], value_kernels=[9, 5, 3])
_MAX_IMG_SIZE = 1 << 14  # beyond, position embeddings alone would take gigabytes
OUT_TYPES = ("featmap", "cls_token")


def resolve_arch(arch: str | dict) -> dict[str, list[int]]:
    """Look up and check an architecture.

    Args:
        arch: a name or alias of ``ARCHS``, or a dict with ``embed_dims``, ``depths``, ``num_heads``
            (4 positive integers each) and optionally ``landmark_strides``, ``value_kernels`` (3
            each, for the softmax-free stages).

    Returns:
        All five lists.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    if isinstance(arch, str):
        name = ARCH_ALIASES.get(arch.lower(), arch.lower())
        if name not in ARCHS:
            known = ", ".join(f"'{k}' ('{k[0]}')" for k in ARCHS)
            raise ValueError(f"arch '{arch}' is unknown; choose {known}, or pass a dict")
        arch = ARCHS[name]
    elif not isinstance(arch, dict):
        raise TypeError(f"arch must be a name or a dict, got {type(arch).__name__}")
    required = set(ARCHS["tiny"])
    if missing := required - set(arch):
        raise ValueError(f"arch lacks {sorted(missing)}")
    if unknown := set(arch) - required - set(_OPTIONAL):
        raise ValueError(f"arch has unknown keys {', '.join(sorted(map(repr, unknown)))}")
    resolved = {**_OPTIONAL, **arch}
    for key, values in resolved.items():
        length = STAGES - 1 if key in _OPTIONAL else STAGES
        if not isinstance(values, (list, tuple)) or len(values) != length:
            raise ValueError(f"arch[{key!r}] must list {length} integers, got {values!r}")
        if not all(_is_int(value) and value > 0 for value in values):
            raise ValueError(f"arch[{key!r}] must hold positive integers, got {values!r}")
    for dims, heads in zip(resolved["embed_dims"], resolved["num_heads"]):
        if dims % heads:
            raise ValueError(
                f"arch['embed_dims'] {dims} is not a multiple of its num_heads {heads}"
            )
    if any(kernel % 2 == 0 for kernel in resolved["value_kernels"]):
        raise ValueError(f"arch['value_kernels'] must be odd, got {resolved['value_kernels']}")
    return {key: list(values) for key, values in resolved.items()}


# The protocol of Nystromformer (arXiv 2102.03902) for the Long Range Arena, which others follow.
SEQUENCE_ARCHS = {"lra": dict(embed_dims=64, depth=2, num_heads=2, hidden_dims=128)}


def resolve_sequence_arch(arch: str | dict) -> dict[str, int]:
    """Look up and check an architecture of a sequence backbone.

    Args:
        arch: a key of ``SEQUENCE_ARCHS``, or a dict with the keys of its values.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    if isinstance(arch, str):
        if arch not in SEQUENCE_ARCHS:
            known = ", ".join(map(repr, SEQUENCE_ARCHS))
            raise ValueError(f"arch {arch!r} is unknown; choose {known}, or pass a dict")
        return dict(SEQUENCE_ARCHS[arch])
    if not isinstance(arch, dict):
        raise TypeError(f"arch must be a name or a dict, got {type(arch).__name__}")
    keys = SEQUENCE_ARCHS["lra"].keys()
    if set(arch) != set(keys):
        raise ValueError(f"arch must have the keys {', '.join(keys)}, got {sorted(map(str, arch))}")
    for key in keys:
        check_int(f"arch[{key!r}]", arch[key], 1)
    if arch["embed_dims"] % arch["num_heads"]:
        raise ValueError(
            f"arch['embed_dims'] {arch['embed_dims']} is not a multiple of its num_heads "
            f"{arch['num_heads']}"
        )
    return dict(arch)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless a value is an integer within bounds, both included."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_rate(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_img_size(img_size: Any) -> tuple[int, int]:
    """Return (height, width) of ``img_size``, or raise."""
    size = tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if len(size) != 2 or not all(_is_int(side) and 0 < side <= _MAX_IMG_SIZE for side in size):
        raise ValueError(
            f"img_size must be one or two positive integers up to {_MAX_IMG_SIZE}, got {img_size!r}"
        )
    return size


def check_init_cfg(init_cfg: Any) -> None:
    """Raise TypeError unless ``init_cfg`` is None, a dict with ``type``, or a list of them."""
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    if init_cfg is not None and not all(isinstance(cfg, dict) and "type" in cfg for cfg in cfgs):
        raise TypeError(f"init_cfg must be a dict with 'type', or a list of them, got {init_cfg!r}")


def check_out_indices(out_indices: Any, out_type: str) -> tuple[int, ...]:
    """Return ``out_indices`` as increasing numbers of stages, or raise."""
    check_choice("out_type", out_type, OUT_TYPES)
    if _is_int(out_indices):
        out_indices = (out_indices,)
    if not isinstance(out_indices, Sequence) or not all(map(_is_int, out_indices)):
        raise TypeError(f"out_indices must list integers, got {out_indices!r}")
    indices = tuple(i + STAGES if i < 0 else i for i in out_indices)
    if not indices or any(i not in range(STAGES) for i in indices):
        raise ValueError(f"out_indices must name stages 0 to 3, got {out_indices!r}")
    if list(indices) != sorted(set(indices)):
        raise ValueError(f"out_indices must increase, got {out_indices!r}")
    if out_type == "cls_token" and indices != (STAGES - 1,):
        raise ValueError(f"out_type='cls_token' needs out_indices=(3,), got {out_indices!r}")
    return indices
