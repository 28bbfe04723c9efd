"""`local_filters`: depthwise convolutions of each channel, and weights of the release in them."""

import pytest
import torch
import torch.nn.functional as F
from metrics import error, same
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import load_state_dict
from released import ARCH
from torch import nn

from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import LocalConv2d, SoftmaxAttention, SoftmaxFreeAttention
from mmsoft.models.layers import SoftmaxBlock

LAST = f"stages.3.blocks.{ARCH['depths'][3] - 1}.attn.token_conv.weight"


def backbone(variant=SOFTPlusPlus, **options):
    torch.manual_seed(0)
    return variant(ARCH, **options).eval()


def attentions(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def images():
    return torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))


def definition(image, weight):
    """Sum over the kernel of the shifted image; filters are for as many channels in a row."""
    filters, _, size, _ = weight.shape
    weight = weight[:, 0].repeat_interleave(image.shape[1] // filters, 0)
    height, width = image.shape[2:]
    padded = F.pad(image, [size // 2] * 4)
    out = torch.zeros_like(image)
    for row in range(size):
        for col in range(size):
            part = padded[:, :, row : row + height, col : col + width]
            out = out + weight[:, row, col, None, None] * part
    return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3, 9])
@pytest.mark.parametrize("filters", [2, 6])
def test_convolution_is_its_definition_with_both_gradients(filters, kernel, memory_format):
    conv = LocalConv2d(filters, kernel)
    image = torch.randn(2, 6, 7, 5).contiguous(memory_format=memory_format).requires_grad_()
    cotangent = torch.randn(2, 6, 7, 5)
    found = [
        (out := conv(image)),
        *torch.autograd.grad(out, (image, conv.weight), cotangent),
    ]
    exact = [t.detach().double().requires_grad_() for t in (image, conv.weight)]
    out = definition(*exact)
    expected = [out, *torch.autograd.grad(out, exact, cotangent.double())]
    assert all(error(a, b) < 1e-6 for a, b in zip(found, expected))
    assert found[0].is_contiguous(memory_format=memory_format)
    assert found[2].stride() == conv.weight.stride()


@pytest.mark.parametrize("local_filters", ["channel", "head"])
def test_values_are_convolved_channel_by_channel_or_head_by_head(local_filters):
    layer = SoftmaxFreeAttention(12, 3, 2, 5, normalize=True, local_filters=local_filters)
    assert len(layer.value_conv.weight) == dict(channel=12, head=3)[local_filters]
    v = torch.randn(2, 7 * 5, 12)
    image = v.double().transpose(1, 2).unflatten(2, (7, 5))
    expected = definition(image, layer.value_conv.weight.double()).flatten(2).transpose(1, 2)
    assert error(layer.convolve_values(v, (7, 5)), expected) < 1e-6


@pytest.mark.parametrize("max_keys", [None, 9])
def test_stage_4_adds_a_convolution_of_the_grid(max_keys):
    torch.manual_seed(0)
    layer = SoftmaxAttention(12, 3, max_keys=max_keys)
    plain = SoftmaxAttention(12, 3, max_keys=max_keys, local_filters="head")
    assert plain.token_conv is None
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "token_conv" not in k})
    x = torch.randn(2, 1 + 7 * 5, 12)
    image = x[:, 1:].double().transpose(1, 2).unflatten(2, (7, 5))
    expected = plain(x, (7, 5)).double()
    convolved = definition(image, layer.token_conv.weight.double()).flatten(2).transpose(1, 2)
    expected[:, 1:] += convolved
    assert error(layer(x, (7, 5)), expected) < 1e-6
    assert same(layer(x, (7, 5))[:, 0], plain(x, (7, 5))[:, 0])  # the class token has no neighbours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    torch.manual_seed(0)
    layer, x = SoftmaxAttention(12, 3), torch.randn(2, 1 + 7 * 5, 12)
    with torch.autocast("cpu", dtype):
        out = layer(x, (7, 5))
    assert error(out.float(), layer(x, (7, 5))) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
def test_weights_of_the_release_fit_and_compute_the_same(variant):
    """Bit by bit: every channel takes its head's filter, and stage 4 zeros."""
    released = backbone(variant, local_filters="head", landmarks="released")
    model = backbone(variant, landmarks="released")
    for layer in attentions(model, SoftmaxAttention):
        assert not layer.token_conv.weight.any()  # from scratch, too
        nn.init.ones_(layer.token_conv.weight)
    x = images()
    assert not same(model(x)[0], released(x)[0])
    model.load_state_dict(released.state_dict())
    assert all(map(same, model(x), released(x)))
    convs = [layer.token_conv.weight for layer in attentions(model, SoftmaxAttention)]
    assert len(convs) == ARCH["depths"][3]
    assert not any(conv.any() for conv in convs)
    # From there every channel goes its own way.
    model.train()
    sum(out.square().sum() for out in model(x)).backward()
    for layer in attentions(model, SoftmaxFreeAttention):
        for head in layer.value_conv.weight.grad.unflatten(0, (layer.num_heads, -1)):
            assert not torch.allclose(head[0], head[1])
    assert all(conv.grad.any() for conv in convs)


def test_content_landmarks_and_whole_models_too():
    """Through MMEngine, with a prefix, as an earlier version saved them."""
    released, model = nn.Module(), nn.Module()
    released.backbone, model.backbone = backbone(local_filters="head"), backbone()
    weights = released.state_dict()
    del weights._metadata
    load_state_dict(model, weights, strict=True)
    x = images()
    assert all(map(same, model.backbone(x), released.backbone(x)))


def test_the_log_counts_what_weights_of_heads_leave_at_zero(caplog):
    depth = ARCH["depths"][3]
    model = backbone()
    model.load_state_dict(backbone(local_filters="head").state_dict())
    logger = MMLogger.get_instance("test-local-filters")
    logger.addHandler(caplog.handler)
    model.train()
    logger.removeHandler(caplog.handler)
    size = len(model.state_dict())
    assert f"loaded {size - depth} of {size} tensors of the backbone, " in caplog.text
    assert f"; {depth} that the checkpoint's model does not have are 0" in caplog.text
    assert caplog.records[0].levelname == "INFO"


@pytest.mark.parametrize("part", ["stages.0.", "stages.3.", ""])
def test_weights_of_each_channel_do_not_fit_heads(part):
    weights = {k: v for k, v in backbone().state_dict().items() if k.startswith(part)}
    with pytest.raises(ValueError, match=r"stages\.[03].*set local_filters='channel'"):
        backbone(local_filters="head").load_state_dict(weights, strict=False)


def test_what_a_damaged_checkpoint_lacks_is_missing():
    weights = backbone().state_dict()
    names = [name for name in weights if name.endswith("token_conv.weight")]
    for name in names:
        del weights[name]
    missing, unexpected = backbone().load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (names, [])
    name = "stages.1.blocks.0.attn.value_conv.weight"
    weights = backbone().state_dict()
    weights[name] = weights[name][:3]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        backbone().load_state_dict(weights)


def test_a_part_of_a_layer_changes_nothing_else():
    model = backbone()
    nn.init.ones_(model.get_parameter(LAST))
    name = LAST.replace("token_conv", "query")
    model.load_state_dict({name: torch.zeros_like(model.get_parameter(name))}, strict=False)
    assert not model.get_parameter(name).any()
    assert bool((model.get_parameter(LAST) == 1).all())


def test_layers_load_alone():
    released, model = backbone(local_filters="head"), backbone()
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            nn.init.ones_(module.token_conv.weight)
    model.stages.load_state_dict(released.stages.state_dict())
    model.norm.load_state_dict(released.norm.state_dict())
    assert all(map(same, model(images()), released(images())))


def test_a_classifier_has_no_convolution_that_it_cannot_train():
    """And passes what it learned on to a detector, and back, whole or in parts."""
    classifier = backbone(out_indices=(3,), out_type="cls_token")
    blocks = [m for m in classifier.modules() if isinstance(m, SoftmaxBlock)]
    absent = [block.attn.token_conv is None for block in blocks]
    assert absent == [False] * (len(blocks) - 1) + [True]
    dense, seen = backbone(), []
    for model in (classifier, dense):
        model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    nn.init.ones_(dense.get_parameter(LAST))
    dense.load_state_dict(classifier.state_dict())
    assert not dense.get_parameter(LAST).any()
    classifier(images())
    dense(images())
    assert same(*seen)
    seen.clear()
    torch.manual_seed(1)
    other = SOFTPlusPlus(ARCH).eval()
    nn.init.ones_(other.get_parameter(LAST))
    classifier.load_state_dict(other.state_dict())
    dense.load_state_dict(other.state_dict())
    classifier(images())
    dense(images())
    assert same(seen[0][:, 0], seen[1][:, 0])
    assert not same(*seen)
    part = {k: v for k, v in other.state_dict().items() if k.startswith("stages.3.")}
    assert not classifier.load_state_dict(part, strict=False).unexpected_keys
    part[f"{LAST}s"] = part.pop(LAST)
    with pytest.raises(ValueError, match="keys such as"):
        classifier.load_state_dict(part, strict=False)


def test_unknown_filters_are_refused():
    for build in (
        lambda: backbone(local_filters="chanel"),
        lambda: SoftmaxFreeAttention(12, 3, 2, 5, normalize=True, local_filters="chanel"),
        lambda: SoftmaxAttention(12, 3, local_filters="chanel"),
    ):
        with pytest.raises(ValueError, match="local_filters must be"):
            build()
