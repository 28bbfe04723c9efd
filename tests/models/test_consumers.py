"""What the backbones hand over, where it is used: operators that read raw memory."""

from functools import cache

import pytest
import torch
from on_device import device_type
from operators import before_torch
from released import ARCH, SMALL

from mmsoft.models import SOFT, SOFTPlusPlus

# mmcv-lite has no operators.
ops = pytest.importorskip("mmcv.ops")
pytest.importorskip("mmcv._ext")

SIZE = (96, 160)
BOXES = torch.tensor(
    [[0, 5.0, 8.0, 90.0, 60.0], [1, 30.0, 0.0, 150.0, 95.0], [1, 1.0, 2.0, 9.0, 9.0]]
)


def roi_align(x):
    return ops.RoIAlign(7, 1 / 8, sampling_ratio=0)(x, BOXES.to(x.device))


def roi_align_rotated(x):
    angles = torch.tensor([0.3, -0.8, 0.0])
    boxes = BOXES.to(x.device)
    boxes = torch.column_stack([boxes[:, 0], boxes[:, 1:3] + 20, boxes[:, 3:] / 3, angles])
    return ops.RoIAlignRotated(7, 1 / 8, sampling_ratio=2)(x, boxes)


def deformable(module, x, channels):
    torch.manual_seed(0)
    module = module(x.shape[1], 8, 3, padding=1)
    torch.nn.init.normal_(module.weight)
    offsets = torch.randn(x.shape[0], channels, *x.shape[2:])
    if channels == 18:
        return module(x, offsets)
    return module(x, offsets[:, :18], offsets[:, 18:].sigmoid())


def deform_conv(x):
    return deformable(ops.DeformConv2d, x, 18)


def modulated_deform_conv(x):
    return deformable(ops.ModulatedDeformConv2d, x, 27)


def deformable_attention(x):
    torch.manual_seed(0)
    module = ops.MultiScaleDeformableAttention(x.shape[1], num_heads=2, num_levels=1)
    tokens = x.flatten(2).transpose(1, 2)
    reference = torch.rand(*tokens.shape[:2], 1, 2)
    shapes = torch.tensor([x.shape[2:]])
    # As MMDetection's encoders do.
    return module(
        tokens.transpose(0, 1),
        value=tokens.transpose(0, 1),
        reference_points=reference,
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0]),
    )


def psa_mask(x):
    return ops.PSAMask("collect", (x.shape[1] // 4, 4))(x)


def rotated_feature_align(x):
    torch.manual_seed(0)
    boxes = torch.rand(x.shape[0], *x.shape[2:], 5) * torch.tensor([90.0, 60.0, 40.0, 40.0, 1.0])
    return ops.rotated_feature_align(x, boxes, spatial_scale=1 / 8, points=5)


def numpy_memory(x):
    """What anybody reads who takes the pointer and the shape."""
    return x.as_strided((x.numel(),), (1,)).view(x.shape)


# Of mmcv's operators on images those that it builds for CPUs; RoIPool, DeformRoIPool, PrRoIPool,
# CARAFE, CrissCross and BorderAlign exist for GPUs alone, where the same test has to be run.
CONSUMERS = [
    roi_align,
    roi_align_rotated,
    rotated_feature_align,
    psa_mask,
    deform_conv,
    modulated_deform_conv,
    deformable_attention,
    numpy_memory,
]
SAFE = [deformable_attention]  # MMDetection gives it tokens, which it flattens itself
MODES = ["eval", "inference", "train", "checkpointed", "autocast", "compiled", "exported"]


def features(mode, variant=SOFTPlusPlus):
    """Every stage's features of two images."""
    return computed(mode, variant)


@cache
def computed(mode, variant):
    if mode == "exported" and before_torch("2.6"):
        pytest.skip("torch.export needs torch >= 2.6")
    torch.manual_seed(0)
    model = variant(SMALL, with_cp=mode == "checkpointed")
    model.train(mode in ("train", "checkpointed"))
    x = torch.randn(2, 3, *SIZE)
    with (
        torch.set_grad_enabled(mode in ("train", "checkpointed", "autocast")),
        torch.inference_mode(mode == "inference"),
        torch.autocast(device_type(), torch.bfloat16, enabled=mode == "autocast"),
    ):
        if mode == "compiled":
            torch._dynamo.reset()
            return torch.compile(model, backend="aot_eager")(x)
        if mode == "exported":
            return torch.export.export(model, (x,)).module()(x)
        return model(x)


@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
@pytest.mark.parametrize("mode", MODES)
def test_features_are_contiguous(mode, variant):
    outs = features(mode, variant)
    assert len(outs) == 4
    for out in outs:
        assert out.is_contiguous()
        assert out.stride() == torch.empty(out.shape).stride()
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (7, 300)], ids=str)
def test_contiguous_at_every_batch_and_size(batch, size):
    with torch.no_grad():
        for out in SOFTPlusPlus(ARCH).eval()(torch.randn(batch, 3, *size)):
            assert out.stride() == torch.empty(out.shape).stride()


def test_class_token_is_contiguous_and_keeps_no_other_token():
    model = SOFTPlusPlus(ARCH, out_indices=3, out_type="cls_token").eval()
    (token,) = model(torch.randn(2, 3, *SIZE))
    assert token.is_contiguous()
    assert token.untyped_storage().nbytes() == 4 * token.numel()


@pytest.mark.parametrize("mode", ["eval", "train", "autocast", "compiled"])
@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda f: f.__name__)
def test_consumers_see_the_features(consumer, mode):
    for feature in features(mode):
        feature = feature.detach().float()  # mmcv's operators for CPUs know no other dtype
        expected = consumer(feature.clone(memory_format=torch.contiguous_format))
        assert torch.equal(consumer(feature), expected)


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda f: f.__name__)
def test_the_consumers_do_not_look_at_strides(consumer):
    """Why the layout matters: the same numbers in another layout fail or give another result."""
    feature = features("eval")[1].detach()
    expected = consumer(feature)
    try:
        scrambled = consumer(feature.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return
    assert bool((scrambled - expected).abs().max() > 1e-3) is (consumer not in SAFE)


def test_necks_keep_the_features_contiguous():
    """FPN keeps the layout of what it gets; what RoIAlign reads is what comes out of it."""
    pytest.importorskip("mmdet")
    from mmdet.models import FPN

    neck = FPN([32, 64, 96, 128], 16, 5)
    for mode in ("eval", "train"):
        assert all(out.is_contiguous() for out in neck(features(mode)))


@pytest.mark.parametrize("norm_eval", [False, True])
def test_gradients_have_the_layout_of_their_parameters(norm_eval):
    """As DistributedDataParallel's buckets and fused optimizers expect."""
    model = SOFTPlusPlus(ARCH, norm_eval=norm_eval, max_landmarks=9)
    x = torch.randn(2, 3, *SIZE, requires_grad=True)
    sum(out.square().mean() for out in model(x)).backward()
    for tensor in (x, *model.parameters()):
        assert tensor.is_contiguous()
        assert tensor.grad.stride() == tensor.stride()
