"""Conversion of the checkpoints that the authors released.

A released file is what timm's saver writes: a dict with ``state_dict``, mostly ``state_dict_ema``,
and a pickled ``argparse.Namespace`` under ``args``.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmsoft.version import __version__

from .checks import infer_arch, summary

# What our metafiles call their weights: `mim download` fails without any, and downloads nothing for
# an address that ends in a slash.
NO_WEIGHTS = "none published/"
# Applied in order to the released name of a parameter.
_RENAMES = [
    (r"^module\.", lambda m: ""),
    (r"^patch_embed(\d)\.proj\.(\d)\.", lambda m: _patch_embed(int(m[1]), int(m[2]))),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^cls_token$", lambda m: "stages.3.cls_token"),
    (r"^block(\d)\.(\d+)\.(?:att\.)?", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.mha\.W_q\.", lambda m: ".attn.query."),
    (r"\.mha\.W_v\.", lambda m: ".attn.value."),
    (r"\.mha\.ff\.", lambda m: ".attn.proj."),
    (r"\.mha\.attn\.Qlandmark_op\.", lambda m: ".attn.landmark_conv."),
    (r"\.mha\.attn\.Qnorm_act\.0\.", lambda m: ".attn.landmark_norm."),
    (r"\.mha\.attn\.conv\.", lambda m: ".attn.value_conv."),
    (r"\.ff1\.|\.mlp\.fc1\.", lambda m: ".mlp.0."),
    (r"\.ff2\.|\.mlp\.fc2\.", lambda m: ".mlp.3."),
    (r"\.attn\.q\.", lambda m: ".attn.query."),
    (r"\.attn\.kv\.", lambda m: ".attn.key_value."),
    (r"^head\.", lambda m: "head.fc."),
]


def _patch_embed(stage: int, index: int) -> str:
    # The release numbers (conv, norm, ReLU) triples through.
    return f"stages.{stage - 1}.patch_embed.{index // 3}.{('conv', 'norm')[index % 3]}."


def convert_released_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's keys to ours (``stages.*``, ``norm.*``, ``head.fc.*``).

    Raises:
        ValueError: there are names that the release does not have.
    """
    converted = {}
    for name, value in state_dict.items():
        for pattern, replace in _RENAMES:
            name = re.sub(pattern, replace, name)
        converted[name] = value
    ours = ("stages.", "norm.", "head.")
    if unknown := [name for name in converted if not name.startswith(ours)]:
        raise ValueError(f"released checkpoint has unknown keys: {summary(unknown)}")
    return converted


def is_released(checkpoint: Any) -> bool:
    """Whether a loaded file is a SOFT or SOFT++ checkpoint in the authors' format."""
    if not isinstance(checkpoint, dict):
        return False
    weights = checkpoint.get("state_dict", checkpoint)
    return isinstance(weights, dict) and bool(
        {"block1.0.att.mha.W_q.weight", "module.block1.0.att.mha.W_q.weight"} & set(weights)
    )


def convert_released(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a released checkpoint into an OpenMMLab one.

    The EMA weights are taken where the file has them, because the authors trained with EMA and
    published the better of the two.

    Args:
        checkpoint: the content of the file, see :func:`is_released`.

    Returns:
        ``state_dict`` with ``backbone.*`` and ``head.fc.*``, the names of a classifier; and
        ``meta``, whose ``released`` describes the file: ``weights`` (the key they came from),
        ``variant`` (``'SOFT'``, ``'SOFT++'``, or ``None`` if the file does not say), ``arch``
        (:func:`infer_arch`), ``epoch``.

    Raises:
        ValueError: the file has keys that the release does not.
    """
    key = "state_dict_ema" if checkpoint.get("state_dict_ema") else "state_dict"
    weights = convert_released_keys(checkpoint.get(key, checkpoint))
    # Both classes have the same keys; timm's model name differs: soft_tiny, soft_norm_tiny.
    name = getattr(checkpoint.get("args"), "model", None) or checkpoint.get("arch")
    match = re.match(r"soft_(norm_)?", name.lower()) if isinstance(name, str) else None
    variant = None if match is None else "SOFT++" if match[1] else "SOFT"
    state_dict = OrderedDict(
        (name if name.startswith("head.") else f"backbone.{name}", value)
        for name, value in weights.items()
    )
    # Handed by load_state_dict to each module, where the backbone checks it.
    state_dict._metadata = {"backbone": {"variant": variant}}  # type: ignore[attr-defined]
    released = dict(
        weights=key, variant=variant, arch=infer_arch(weights), epoch=checkpoint.get("epoch")
    )
    return dict(meta=dict(mmsoft_version=__version__, released=released), state_dict=state_dict)
