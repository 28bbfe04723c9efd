"""Released SOFT and SOFT++ checkpoints in terms of our parameter names."""

import re

from torch import Tensor

# Applied in order to the released name of a parameter.
_RENAMES = [
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


def convert_released_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's keys to ours (``stages.*``, ``norm.*``, ``head.fc.*``)."""
    converted = {}
    for name, value in state_dict.items():
        for pattern, replace in _RENAMES:
            name = re.sub(pattern, replace, name)
        converted[name] = value
    return converted
