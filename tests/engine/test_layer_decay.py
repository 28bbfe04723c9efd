"""Learning rate and weight decay of every parameter, in all three libraries."""

import pytest
import torch
from mini_models import LIBRARIES, build
from mmengine.optim import build_optim_wrapper

LR, DECAY, RATE = 1e-3, 0.05, 0.5
# What the README recommends, and the ImageNet configs set; biases decay in the dense ones.
# `norm_decay_mult` reaches BatchNorm, LayerNorm and with them the landmark norm by their class; the
# keys are substrings of parameter names.
PARAMWISE = dict(
    norm_decay_mult=0.0,
    bias_decay_mult=0.0,
    custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
)
OURS = "mmsoft.LayerDecayOptimWrapperConstructor"

NORM = ("weight", False), ("bias", False)
AFFINE = ("weight", True), ("bias", False)
CONV_NORM = {"conv": AFFINE, "norm": NORM}
SOFT_BLOCK = {
    **{f"attn.{name}": AFFINE for name in ("query", "value", "proj")},
    "attn.landmark_conv": AFFINE[:1],
    "attn.landmark_norm": NORM,
    "attn.value_conv": AFFINE[:1],
    **{"norm1": NORM, "mlp.0": AFFINE, "mlp.3": AFFINE, "norm2": NORM},
}
SOFTMAX_BLOCK = {
    **{f"attn.{name}": AFFINE for name in ("query", "key_value", "proj")},
    **{"norm1": NORM, "mlp.0": AFFINE, "mlp.3": AFFINE, "norm2": NORM},
}
# For each module of the mini backbone: its depth (of 9), its parameters and whether they decay.
MODULES = [
    *((f"stages.0.patch_embed.{i}.{n}", 0, p) for i in range(3) for n, p in CONV_NORM.items()),
    ("stages.0", 0, [("pos_embed", False)]),
    *((f"stages.0.blocks.0.{name}", 1, p) for name, p in SOFT_BLOCK.items()),
    *((f"stages.1.patch_embed.0.{name}", 2, p) for name, p in CONV_NORM.items()),
    ("stages.1", 2, [("pos_embed", False)]),
    *((f"stages.1.blocks.{i}.{name}", 2 + i, p) for i in (0, 1) for name, p in SOFT_BLOCK.items()),
    *((f"stages.2.patch_embed.0.{name}", 4, p) for name, p in CONV_NORM.items()),
    ("stages.2", 4, [("pos_embed", False)]),
    *((f"stages.2.blocks.{i}.{name}", 4 + i, p) for i in (0, 1) for name, p in SOFT_BLOCK.items()),
    *((f"stages.3.patch_embed.0.{name}", 6, p) for name, p in CONV_NORM.items()),
    ("stages.3", 6, [("pos_embed", False), ("cls_token", False)]),
    *(
        (f"stages.3.blocks.{i}.{name}", 6 + i, p)
        for i in (0, 1)
        for name, p in SOFTMAX_BLOCK.items()
    ),
    ("norm", 8, NORM),
]  # fmt: skip
EXPECTED = {
    f"backbone.{module}.{name}": (depth, decays)
    for module, depth, parameters in MODULES
    for name, decays in parameters
}


@pytest.fixture(params=LIBRARIES)
def model(request):
    return build(request.param)


def settings(model, constructor=None, **paramwise):
    """Name -> (learning rate, weight decay)."""
    cfg = dict(
        optimizer=dict(type="AdamW", lr=LR, weight_decay=DECAY),
        paramwise_cfg={**PARAMWISE, **paramwise},
    )
    if constructor:
        cfg["constructor"] = constructor
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def test_weight_decay(model):
    """MMEngine's own constructor with these settings; every parameter is listed."""
    found = settings(model)
    backbone = {name: value for name, value in found.items() if name.startswith("backbone.")}
    assert backbone == {
        name: (LR, DECAY if decays else 0.0) for name, (_, decays) in EXPECTED.items()
    }
    exempt = {name for name, (_, decay) in backbone.items() if decay == 0}
    assert exempt == {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    others = {name: value for name, value in found.items() if name not in backbone}
    assert others
    for name, (_, decay) in others.items():
        assert decay == (0.0 if name.endswith("bias") else DECAY), name


def test_layer_decay(model):
    assert model.backbone.get_layer_depth("stages.1.pos_embed") == (2, 9)
    found = settings(model, OURS, layer_decay_rate=RATE)
    for name, (lr, decay) in found.items():
        depth, decays = EXPECTED.get(name, (8, not name.endswith("bias")))
        assert lr == pytest.approx(LR * RATE ** (8 - depth)), name
        assert decay == (DECAY if decays else 0.0), name


def test_layer_decay_combines_with_other_multipliers(model):
    found = settings(
        model, OURS, layer_decay_rate=RATE, custom_keys={"blocks.0.mlp": dict(lr_mult=0.1)}
    )
    assert found["backbone.stages.0.blocks.0.mlp.0.weight"][0] == pytest.approx(LR * RATE**7 * 0.1)
    assert settings(model, OURS) == settings(model)  # a rate of 1 by default


def test_agrees_with_mmpretrain():
    model = build("mmpretrain")
    theirs = settings(model, "LearningRateDecayOptimWrapperConstructor", layer_decay_rate=RATE)
    ours = settings(model, OURS, layer_decay_rate=RATE)
    assert theirs.keys() == ours.keys()
    for name, values in ours.items():
        assert theirs[name] == pytest.approx(values), name


def test_other_backbones_are_refused():
    model = torch.nn.Module()
    model.backbone = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"backbone has get_layer_depth, got Module .* Linear"):
        settings(model, OURS, layer_decay_rate=RATE)
