"""Both backbones: architectures, options, initialization, forward, structure."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from metrics import same
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from on_device import device_type
from operators import needs_torch_2_9
from released import ARCH, images
from torch import nn

from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from mmsoft.models.backbones.arch import ARCHS, resolve_arch
from mmsoft.models.layers import (
    SOFTBlock,
    SoftmaxBlock,
    Stage,
    TanhGELU,
    resize_pos_embed,
)
from mmsoft.models.norms import ImageNorm, PixelNorm

DIMS = ARCH["embed_dims"]
SIZES = [(33, 33), (17, 900), (112, 137), (511, 511), (32, 32), (31, 2), (5, 70), (1, 1)]


@pytest.fixture(params=[SOFT, SOFTPlusPlus])
def variant(request):
    return request.param


@pytest.fixture
def mini(variant):
    """Build a small backbone."""
    return lambda **kwargs: variant(kwargs.pop("arch", ARCH), **kwargs)


@pytest.fixture
def released(mini):
    """One whose landmarks are the release's."""
    return partial(mini, landmarks="released")


@pytest.fixture
def pair(released):
    """Build a small backbone and one with other options, of the same weights, for evaluation."""

    def pair(**options):
        plain, other = released().eval(), released(**options).eval()
        missing, _ = other.load_state_dict(plain.state_dict(), strict=False)
        assert not missing
        return plain, other

    return pair


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def image(height=64, width=96, batch=2, channels=3):
    return torch.randn(batch, channels, height, width)


def statistics(model):
    return [m.running_mean.clone() for m in modules(model, _BatchNorm)]


# Architectures


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 13.07), ("small", 24.11), ("medium", 45.81), ("large", 64.70), ("huge", 87.11)],
)
def test_published_sizes(variant, name, millions):
    """With the 1000-way head; an initial, and capitals, name the same."""
    with torch.device("meta"):
        for arch in (name, name[0], name.upper()):
            backbone = variant(arch)
            assert backbone.arch_settings["depths"] == ARCHS[name]["depths"]
            head = nn.Linear(backbone.arch_settings["embed_dims"][-1], 1000)
    count = sum(p.numel() for m in (backbone, head) for p in m.parameters())
    assert round(count / 1e6, 2) == millions
    for i, stage in enumerate(backbone.stages):
        assert len(stage.blocks) == ARCHS[name]["depths"][i]
        for block in stage.blocks:
            assert block.attn.num_heads == ARCHS[name]["num_heads"][i]
            assert ARCHS[name]["embed_dims"][i] == 32 * block.attn.num_heads


def test_arch_as_a_dict(mini):
    backbone = mini(arch=dict(ARCH, landmark_strides=(4, 4, 2), value_kernels=[3, 5, 7]))
    attention = [stage.blocks[0].attn for stage in backbone.stages[:3]]
    assert [a.landmark_conv.kernel_size[0] for a in attention] == [4, 4, 2]
    assert [a.value_conv.kernel_size[0] for a in attention] == [3, 5, 7]
    assert [type(b) for stage in backbone.stages for b in stage.blocks] == (
        [SOFTBlock] * 5 + [SoftmaxBlock] * 2
    )


@pytest.mark.parametrize(
    ("arch", "kind", "message"),
    [
        ("giant", ValueError, r"arch 'giant' is unknown; choose 'tiny' \('t'\)"),
        (3, TypeError, "arch must be a name or a dict, got int"),
        (dict(depths=[1, 1, 1, 1]), ValueError, r"lacks \['embed_dims', 'num_heads'\]"),
        (dict(ARCH, mlp_ratio=4), ValueError, "unknown keys 'mlp_ratio'"),
        (dict(ARCH, depths=[1, 1, 1]), ValueError, r"\['depths'\] must list 4 .*\[1, 1, 1\]"),
        (dict(ARCH, depths=[1, 1, 0, 1]), ValueError, r"\['depths'\] must hold positive"),
        (dict(ARCH, num_heads=[1, 2, 3, 3]), ValueError, "128 is not a multiple of its num_heads"),
        (dict(ARCH, value_kernels=[9, 4, 3]), ValueError, r"must be odd, got \[9, 4, 3\]"),
    ],
)
def test_bad_arch(arch, kind, message):
    with pytest.raises(kind, match=message):
        resolve_arch(arch)


@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        (dict(out_indices=(0, 4)), ValueError, r"out_indices must name stages 0 to 3.*\(0, 4\)"),
        (dict(out_indices=()), ValueError, "out_indices must name"),
        (dict(out_indices=(1, 0)), ValueError, "out_indices must increase"),
        (dict(out_type="raw"), ValueError, "out_type must be one of.*'raw'"),
        (dict(out_type="cls_token"), ValueError, r"needs out_indices=\(3,\)"),
        (dict(solver="svd"), ValueError, "solver must be one of"),
        (dict(newton_steps=0), ValueError, "newton_steps must be at least 1, got 0"),
        (dict(landmark_sampling="max"), ValueError, "landmark_sampling must be one of"),
        (dict(attn_init="zero"), ValueError, "attn_init must be one of"),
        (dict(max_landmarks=0), ValueError, "max_landmarks must be at least 1"),
        (dict(max_landmarks=4.0), TypeError, "max_landmarks must be an integer, got 4.0"),
        (dict(in_channels=0), ValueError, "in_channels must be at least 1"),
        (dict(frozen_stages=5), ValueError, r"frozen_stages must be in \[-1, 4\], got 5"),
        (dict(drop_rate=1.0), ValueError, r"drop_rate must be in \[0, 1\), got 1.0"),
        (dict(drop_path_rate=-0.1), ValueError, r"drop_path_rate must be in \[0, 1\)"),
        (dict(img_size=(224, 224, 3)), ValueError, "img_size must be one or two"),
    ],
)
def test_bad_options(mini, option, kind, message):
    with pytest.raises(kind, match=message):
        mini(**option)


# Initialization


def test_initial_weights(variant):
    backbone = variant("tiny", out_indices=(1,), attn_init="released", landmarks="released")
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.weight[0, 0].numel() / module.groups
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, Stage):
            assert module.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_attn_init(mini):
    assert all((m.landmark_norm.weight < 1).all() for m in modules(mini(), SoftmaxFreeAttention))
    released = mini(attn_init="released")
    assert all((m.landmark_norm.weight == 1).all() for m in modules(released, SoftmaxFreeAttention))


def test_init_cfg(variant):
    """Through the registry; a checkpoint is the business of tests/test_checkpoint.py."""
    init_cfg = [dict(type="Constant", layer="LayerNorm", val=0.5, bias=0.25)]
    backbone = MODELS.build(dict(type=f"mmsoft.{variant.__name__}", arch=ARCH, init_cfg=init_cfg))
    backbone.init_weights()
    for norm in modules(backbone, nn.LayerNorm):
        assert (norm.weight == 0.5).all()
        assert (norm.bias == 0.25).all()
    assert backbone.init_cfg == init_cfg


# Options


@pytest.mark.parametrize("indices", [0, (3,), (1, 2), [0, 3], -1, (0, 1, 2, 3)])
def test_out_indices(pair, indices):
    full, backbone = pair(out_indices=indices)
    names = {-1: (3,), 0: (0,)}.get(indices, indices) if isinstance(indices, int) else indices
    x = image()
    outs, every = backbone(x), full(x)
    assert isinstance(outs, tuple)
    assert [out.shape for out in every] == [(2, DIMS[i], 16 >> i, 24 >> i) for i in range(4)]
    assert same(outs, tuple(every[i] for i in names))
    assert len(backbone.stages) == max(names) + 1
    assert hasattr(backbone, "norm") == (3 in names)


def test_out_type(mini):
    features, token = mini(out_indices=3).eval(), mini(out_indices=3, out_type="cls_token").eval()
    token.load_state_dict(features.state_dict())
    x = image()
    seen = []
    features.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert features(x)[0].shape == (2, 128, 2, 3)
    assert [out.shape for out in token(x)] == [(2, 128)]
    assert torch.equal(token(x)[0], seen[0][:, 0])


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(mini, frozen):
    backbone = mini(frozen_stages=frozen, drop_rate=0.5, norm_cfg=dict(type="BN"))
    if frozen == 0:
        still = ("stages.0.patch_embed.", "stages.0.pos_embed")
    else:
        still = tuple(f"stages.{i}." for i in range(frozen)) + ("norm.",) * (frozen == 4)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not name.startswith(still)), name
    before = statistics(backbone)
    backbone.train()
    backbone(image())
    # Three norms in the stem, one in each later stage.
    unchanged = {-1: 0, 0: 3, 1: 3, 2: 4, 3: 5, 4: 6}[frozen]
    changed = [not torch.equal(a, b) for a, b in zip(before, statistics(backbone))]
    assert changed == [False] * unchanged + [True] * (6 - unchanged)
    for module in modules(backbone.stages[: max(frozen, 0)], nn.Dropout):
        assert not module.training


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval(mini, norm_eval):
    backbone = mini(norm_eval=norm_eval, norm_cfg=dict(type="BN")).train()
    before = statistics(backbone)
    sum(out.sum() for out in backbone(image())).backward()
    assert same(before, statistics(backbone)) == norm_eval
    norms = modules(backbone, _BatchNorm)
    assert len(norms) == 6
    assert all(norm.weight.grad is not None for norm in norms)
    assert backbone.stages[3].blocks[0].training


@pytest.mark.parametrize(
    ("norm_cfg", "kind"),
    [
        (dict(type="GN", num_groups=4), ImageNorm),
        (dict(type="LN"), PixelNorm),
        (dict(type="SyncBN"), nn.SyncBatchNorm),
        (dict(type="BN"), nn.BatchNorm2d),
    ],
)
def test_norm_cfg(mini, norm_cfg, kind):
    assert len(modules(mini(norm_cfg=norm_cfg), kind)) == 6


@pytest.mark.parametrize("frozen", [-1, 0])
def test_with_cp(mini, frozen, monkeypatch):
    """Blocks run twice, gradients agree to the last bit, and the modern implementation is used."""
    plain = mini(drop_path_rate=0.3, drop_rate=0.1, frozen_stages=frozen).train()
    checkpointed = mini(drop_path_rate=0.3, drop_rate=0.1, frozen_stages=frozen, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    reentrant = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        lambda *args, **kw: reentrant.append(kw["use_reentrant"]) or original(*args, **kw),
    )
    x, calls, gradients = image(), [], []
    for backbone in (plain, checkpointed.train()):
        count = []
        for block in modules(backbone, (SOFTBlock, SoftmaxBlock)):
            block.register_forward_pre_hook(lambda *args, count=count: count.append(1))
        torch.manual_seed(3)
        sum(out.square().sum() for out in backbone(x)).backward()
        calls.append(len(count))
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    assert calls == [7, 14]
    assert same(*gradients)
    assert reentrant == [False] * 7
    with torch.no_grad():
        checkpointed(x)
    assert len(reentrant) == 7


def test_drop_path_grows_linearly(mini):
    backbone = mini(drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])
    assert len({b.drop_path.drop_prob for b in modules(mini(), (SOFTBlock, SoftmaxBlock))}) == 1


def test_drop_path_drops_whole_samples():
    """Stochastic depth: a branch is kept for a sample, and scaled, or not at all."""
    block = SoftmaxBlock(16, SoftmaxAttention(16, 2), drop_path=0.5, drop_rate=0.0).train()
    nn.init.zeros_(block.mlp[3].weight)  # leaves the attention branch alone
    nn.init.zeros_(block.mlp[3].bias)
    x = torch.randn(64, 5, 16)
    branch = block.attn(block.norm1(x), (2, 2))
    factor = ((block(x, (2, 2)) - x) / branch).detach()
    kept = factor.mean((1, 2)).round()
    assert set(kept.tolist()) == {0.0, 2.0}
    assert torch.allclose(factor, kept[:, None, None].expand_as(factor), atol=1e-2)
    block.eval()
    assert torch.allclose(block(x, (2, 2)) - x, branch, atol=1e-5)


def test_max_keys_where_it_is_exact():
    """Four equal tokens and their mean, counted four times, are the same in a softmax."""
    torch.manual_seed(0)
    full, limited = SoftmaxAttention(16, 2), SoftmaxAttention(16, 2, max_keys=13)
    for parameter in full.parameters():
        nn.init.normal_(parameter, std=0.5)
    limited.load_state_dict(full.state_dict())
    grid = torch.randn(2, 3, 3, 16).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = torch.cat((torch.randn(2, 1, 16), grid.flatten(1, 2)), 1)
    difference = limited(x, (6, 6)) - full(x, (6, 6))
    assert difference.abs().max() < 1e-5 * full(x, (6, 6)).abs().max()
    small = torch.cat((x[:, :1], grid[:, ::2, ::2].flatten(1, 2)), 1)
    assert torch.equal(limited(small, (3, 3)), full(small, (3, 3)))


@needs_torch_2_9
def test_max_keys_in_a_program_of_any_size():
    """Recorded at one size, right on both sides of the limit, of 3 rows and columns here."""
    attn = SoftmaxAttention(16, 2, max_keys=13)

    class OfImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attn

        def forward(self, x):
            tokens = x.flatten(2).mT
            return self.attn(torch.cat((tokens[:, :1] + 1, tokens), 1), x.shape[2:])

    model = OfImages().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    dims = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    sample = torch.randn(2, 16, 5, 6)
    program = torch.export.export(model, (sample,), dynamic_shapes={"x": dims}, strict=False)
    for size in ((2, 3), (3, 3), (2, 7), (7, 2), (5, 6), (10, 11)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_max_keys_of_the_backbone(pair):
    (full, backbone), x = pair(max_keys=4), image(96, 160)
    assert {module.max_keys for module in modules(backbone, SoftmaxAttention)} == {4}
    assert same(backbone(x)[:3], full(x)[:3])
    assert not same(backbone(x), full(x))
    assert same(backbone(x[..., :64, :64]), full(x[..., :64, :64]))  # 2 x 2 tokens
    backbone.train()(x)[3].sum().backward()
    assert all(p.grad is not None for p in backbone.stages[3].parameters())


def test_frozen_norm_is_folded(mini):
    """In evaluation a BatchNorm with statistics of its own is applied, whichever way."""
    backbone, x = mini(norm_cfg=dict(type="BN")).double(), image().double()
    for module in modules(backbone, _BatchNorm):
        for tensor in (module.weight, module.running_var):
            nn.init.uniform_(tensor, 0.5, 2)
        nn.init.normal_(module.running_mean)
        nn.init.normal_(module.bias)
    for block in backbone.eval().stages:
        for layer in block.patch_embed:
            # On few pixels the norm is applied as it stands.
            for size, folded in ((2, 1), False), ((40, 44), True):
                image_in = torch.randn(2, layer.conv.in_channels, *size).double()
                assert layer._foldable(image_in) == folded
                plain = nn.Sequential.forward(layer, image_in)
                assert torch.allclose(layer(image_in), plain, atol=1e-12)
    backbone(x)[-1].sum().backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in modules(backbone, _BatchNorm))


def test_drop_rate(mini):
    backbone = mini(drop_rate=0.4).train()
    assert {m.p for m in modules(backbone, nn.Dropout)} == {0.4}
    # one after the position embedding of each stage, three in each block
    assert len(modules(backbone, nn.Dropout)) == 4 + 3 * 7
    x = image()
    assert not same(backbone(x), backbone(x))
    assert same(backbone.eval()(x), backbone(x))
    plain = mini().train()
    assert same(plain(x), plain(x))


@pytest.mark.parametrize("channels", [1, 4])
def test_in_channels(mini, channels):
    assert len(mini(in_channels=channels)(image(channels=channels))) == 4


def test_max_landmarks(pair):
    """A budget changes only what exceeds it, and else no bit."""
    tight, free = pair(max_landmarks=None)
    for attn in modules(tight, SoftmaxFreeAttention):
        attn.max_landmarks = 9
    q = torch.randn(1, 24 * 48, 32)
    count = [
        backbone.stages[0].blocks[0].attn.sample_landmarks(q, (24, 48))[0].shape[2]
        for backbone in (free, tight)
    ]
    assert count[0] == 3 * 6
    assert 6 <= count[1] <= 9
    small, large = image(96, 96, batch=1), image(160, 96, batch=1)
    assert same(free(small), tight(small))
    assert not torch.allclose(free(large)[0], tight(large)[0], atol=1e-5)


@pytest.mark.parametrize("options", [dict(solver="direct"), dict(newton_steps=3)], ids=str)
def test_solver_and_steps(pair, options):
    x = image(96, 96)
    expected, other = (backbone(x)[2] for backbone in pair(**options))
    assert not torch.allclose(expected, other, atol=1e-5)
    assert other.isfinite().all()


def test_landmark_sampling(pair):
    convolved, average = pair(landmark_sampling="avg")
    names = {name for name in convolved.state_dict() if "landmark_conv" in name}
    assert convolved.state_dict().keys() - average.state_dict().keys() == names
    # A convolution can take the average.
    for attn in modules(convolved, SoftmaxFreeAttention):
        stride = attn.landmark_stride
        with torch.no_grad():
            attn.landmark_conv.weight.copy_(torch.eye(32)[..., None, None] / stride**2)
    x = image(70, 96)
    for a, b in zip(convolved(x), average(x)):
        assert torch.allclose(a, b, atol=1e-4)


# Forward


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(mini, size):
    backbone = mini(solver="direct", max_landmarks=64).eval()
    for batch in (0, 1):
        with torch.no_grad():
            outs = backbone(image(*size, batch=batch))
        for i, out in enumerate(outs):
            stride = 4 << i
            assert out.shape == (batch, DIMS[i], *(math.ceil(side / stride) for side in size))
            assert out.isfinite().all()


@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_empty_batch_trains(mini, solver):
    backbone = mini(solver=solver, drop_path_rate=0.1, drop_rate=0.1).train()
    sum(out.sum() for out in backbone(image(batch=0))).backward()
    assert all(p.grad is not None and not p.grad.any() for p in backbone.parameters())
    assert all(s.isfinite().all() for s in statistics(backbone))
    token = mini(out_indices=3, out_type="cls_token", solver=solver)
    assert token(image(batch=0))[0].shape == (0, 128)


def test_detection_size():
    backbone = SOFTPlusPlus("tiny", solver="direct", max_landmarks=256).eval()
    with torch.no_grad():
        outs = backbone(image(800, 1333, batch=1))
    assert [out.shape[2:] for out in outs] == [(200, 334), (100, 167), (50, 84), (25, 42)]
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("shape", [(3, 64, 64), (64, 64)])
def test_not_a_batch_of_images(mini, shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\] with .* got shape"):
        mini()(torch.randn(shape))


@pytest.mark.cpu
def test_float16_that_torch_has_not_is_named(mini, monkeypatch):
    monkeypatch.setattr("mmsoft.ops.library.HAS_CPU_FLOAT16", False)
    backbone = mini().eval()
    with pytest.raises(TypeError, match=r"float16 on a CPU needs torch>=2.3, but torch .* is inst"):
        backbone.half()(torch.zeros(1, 3, 32, 32).half())
    backbone.bfloat16()(torch.zeros(1, 3, 32, 32).bfloat16())


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(out_indices=(0, 2)),
        dict(out_indices=(1,)),
        dict(out_indices=(3,), out_type="cls_token"),
        dict(landmark_sampling="avg", with_cp=True),
        dict(solver="direct", max_landmarks=4),
        dict(frozen_stages=1, norm_eval=True),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(released, options):
    """So that DistributedDataParallel trains with ``find_unused_parameters=False``."""
    backbone = released(**options).train()
    sum((out * torch.randn_like(out)).sum() for out in backbone(image())).backward()
    trained = {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}
    assert [n for n, grad in trained.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in trained.values())
    # Two kinds of bias change nothing: before BatchNorm in training, and of keys in a softmax.
    silent = [n for n, grad in trained.items() if not grad.any() and not n.endswith(".bias")]
    assert silent == []


# Position embeddings


def test_img_size(mini):
    grids = [stage.pos_grid for stage in mini(img_size=(100, 511)).stages]
    assert grids == [(25, 128), (13, 64), (7, 32), (4, 16)]
    assert mini(img_size=(100, 511)).stages[3].pos_embed.shape == (1, 4 * 16 + 1, 128)
    assert [stage.pos_grid[0] for stage in mini().stages] == [56, 28, 14, 7]


def test_position_embeddings_are_resized_in_forward():
    pos_embed = torch.randn(1, 12, 5)
    assert torch.equal(resize_pos_embed(pos_embed, (3, 4), (3, 4)), pos_embed)
    ramp = torch.arange(4.0).repeat(3)[None, :, None]  # grows along the width alone
    wide = resize_pos_embed(ramp, (3, 4), (6, 8)).view(6, 8)
    assert torch.allclose(wide[0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    assert torch.equal(wide, wide[:1].expand_as(wide))


@pytest.mark.parametrize("size", [(160, 256), (96, 96), (224, 224)])
def test_position_embeddings_are_resized_on_load(pair, size):
    """A model of another img_size then gives what the first gives by resizing in forward."""
    source, target = pair(img_size=size)
    assert torch.equal(target.stages[3].pos_embed[:, 0], source.stages[3].pos_embed[:, 0])
    x = images(*size)[:1]
    with torch.no_grad():
        for a, b in zip(source(x), target(x)):
            assert torch.allclose(a, b, atol=1e-4)


def test_position_embeddings_of_a_grid_that_is_not_square(mini):
    """The grid travels beside the state dict: 14x56 tokens are 28x28 as well."""
    source, target = mini(img_size=(56, 224)).eval(), mini(img_size=(112, 448)).eval()
    target.load_state_dict(source.state_dict())
    expected = resize_pos_embed(source.stages[0].pos_embed, (14, 56), (28, 112))
    assert torch.equal(target.stages[0].pos_embed, expected)
    again = mini(img_size=(56, 224))
    again.load_state_dict(source.state_dict())
    assert torch.equal(again.stages[0].pos_embed, source.stages[0].pos_embed)
    bare = dict(mini(img_size=(60, 224)).state_dict())  # 15x56 tokens, metadata lost
    mini(img_size=(60, 224)).load_state_dict(bare)
    with pytest.raises(ValueError, match=r"stages.0.pos_embed must have a square grid or \(56, 56"):
        mini().load_state_dict(bare)


# Structure


def test_copies_and_modes(mini):
    """As EMA hooks do: a copy is independent, and keeps what goes beside the state dict."""
    backbone = mini(img_size=(64, 128), frozen_stages=1).train()
    clone = copy.deepcopy(backbone)
    assert clone.state_dict()._metadata == backbone.state_dict()._metadata
    assert clone.state_dict()._metadata["stages.0"]["pos_grid"] == (16, 32)
    assert clone.stages[1].training
    assert not clone.stages[0].training
    clone.load_state_dict(backbone.state_dict())
    assert not clone.eval().stages[1].training


def test_readable_repr(variant):
    with torch.device("meta"):
        text = repr(variant("huge", drop_path_rate=0.1))
    assert len(text.splitlines()) < 160  # equal blocks are shown once
    assert max(map(len, text.splitlines())) < 140
    for part in ("(0-48): 49 x SOFTBlock", "drop_path_rate=0.1", "pos_embed=(1, 196, 352)"):
        assert part in text


def test_every_softmax_free_attention_is_built_in_one_place():
    class Convolution(nn.Module):
        def __init__(self, embed_dims, landmark_stride, **options):
            super().__init__()
            self.stride, self.proj = landmark_stride, nn.Linear(embed_dims, embed_dims)

        def forward(self, x, hw_shape):
            assert x.shape[1] == hw_shape[0] * hw_shape[1]
            return self.proj(x)

    class Other(SOFTPlusPlus):
        def build_attention(self, **options):
            return Convolution(**options)

    model = Other(ARCH)
    assert not modules(model, SoftmaxFreeAttention)
    assert [m.stride for m in modules(model, Convolution)] == [8, 4, 4, 2, 2]
    assert [len(out.shape) for out in model(torch.randn(1, 3, 64, 64))] == [4] * 4


def test_layer_refuses_a_wrong_number_of_tokens():
    layer = SoftmaxFreeAttention(32, 1, landmark_stride=2, value_kernel=3, normalize=True)
    with pytest.raises(ValueError, match=r"x must have H\*W = 4\*5 tokens, got 21"):
        layer(torch.zeros(1, 21, 32), (4, 5))


def test_tanh_gelu():
    """The form of the evaluation errs no more than torch's own, and never gives NaN."""
    limits = torch.finfo(torch.float32)
    extremes = [0, -0.0, limits.tiny, limits.max, limits.min, 1e19, -1e19, 9, -9, -30]
    x = torch.cat((torch.tensor(extremes), 3 * torch.randn(20000)))
    before = x.clone()
    exact = F.gelu(x.double(), approximate="tanh")
    its_own = F.gelu(x, approximate="tanh")
    with torch.no_grad():
        ours = TanhGELU()(x)
    assert torch.equal(x, before)
    assert torch.isfinite(ours).all()
    ordinary = slice(len(extremes), None)
    torch.testing.assert_close(ours[: len(extremes)].double(), exact[: len(extremes)])
    error = (its_own - exact)[ordinary].abs().max()
    assert (ours - exact)[ordinary].abs().max() <= 2 * error
    # With a backward pass, and in another dtype, it is torch's.
    assert torch.equal(TanhGELU()(x.requires_grad_()), its_own)
    with torch.no_grad():
        half = x[ordinary].bfloat16()
        assert torch.equal(TanhGELU()(half), F.gelu(half, approximate="tanh"))


@pytest.mark.cpu
@pytest.mark.parametrize("max_keys", [None, 4])
def test_parts_of_an_evaluation_make_the_whole(mini, monkeypatch, max_keys):
    """Without gradients a CPU takes the tokens in turns: 7 at a time here, an uneven last part."""
    backbone, x = mini(max_keys=max_keys, max_landmarks=4).eval(), image(80, 112)
    given = [x, x.to(memory_format=torch.channels_last)]
    before = x.clone()
    whole = [out.detach() for out in backbone(x)]
    monkeypatch.setattr("mmsoft.models.layers._Block.part_elements", 7 * DIMS[0])
    after, parts = SOFTBlock._after_attention, []
    monkeypatch.setattr(
        SOFTBlock, "_after_attention", lambda self, *t: parts.append(t[0].shape) or after(self, *t)
    )
    with torch.no_grad():
        for each in given:
            backbone(each)
            assert torch.equal(each, before)
        assert parts[:160] == [(1, 7, DIMS[0])] * 160  # two images of 20 * 28 tokens
        for part, out in zip(backbone(x), whole):
            assert torch.allclose(part, out, atol=1e-5)
            assert part.stride() == out.stride()
        for out in backbone(x[:0]):
            assert out.shape[0] == 0
        with torch.autocast(device_type(), torch.bfloat16):
            halves = backbone(x)
    with torch.autocast(device_type(), torch.bfloat16):
        assert [out.dtype for out in backbone(x)] == [out.dtype for out in halves]
