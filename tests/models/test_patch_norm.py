"""The norm of the patch embeddings: of each image alone, or BatchNorm where weights have that."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.model import ExponentialMovingAverage
from operators import before_torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmsoft.checkpoint import load_backbone
from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models import norms as norms_module
from mmsoft.models.layers import ConvNormAct
from mmsoft.models.norms import ImageNorm, PixelNorm, become, build_norm
from mmsoft.models.padding import Inside
from mmsoft.ops import group_norm

ARCH = dict(embed_dims=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4])
BATCH_NORM = dict(type="BN")
DEFAULT = [ImageNorm] + [PixelNorm] * 5
SIZES = [(9, 13), (5, 13), (9, 1), (1, 1)]


def backbone(variant=SOFTPlusPlus, seed=0, **options):
    torch.manual_seed(seed)
    return variant(ARCH, **options)


def trained(variant=SOFTPlusPlus, **options):
    """With statistics and weights that are not the initial ones."""
    model = backbone(variant, seed=1, norm_cfg=BATCH_NORM, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
    return model


def norms(model):
    return [module.norm for module in model.modules() if isinstance(module, ConvNormAct)]


def kinds(model):
    return [type(norm) for norm in norms(model)]


@pytest.fixture
def log():
    logger, lines = MMLogger.get_current_instance(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# ---------------------------------------------------------------------------------- the operator


def inside():
    rows, cols = (torch.tensor(each)[:, None] for each in zip(*SIZES))
    return Inside(torch.arange(9) < rows, torch.arange(13) < cols)


def image_norm(dtype=torch.float32, **options):
    torch.manual_seed(0)
    norm = ImageNorm(4, 12, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.to(dtype)


def pixel_norm(dtype=torch.float32, affine=True):
    torch.manual_seed(0)
    norm = PixelNorm(12, elementwise_affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.to(dtype)


def filled_up(dtype, beyond, offset=0.0):
    torch.manual_seed(1)
    x = offset + torch.randn(len(SIZES), 12, 9, 13, dtype=torch.float64)
    x = x.to(dtype)
    for image, (h, w) in zip(x, SIZES):
        image[:, h:], image[:, :, w:] = beyond, beyond
    return x


def each_alone(norm, x, weight):
    """The definition: GroupNorm of each image, without what fills it up, and its gradients."""
    reference, image = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    out = torch.zeros_like(image)
    for number, (h, w) in enumerate(SIZES):
        part = image[number : number + 1, :, :h, :w]
        own = F.group_norm(part, 4, reference.weight, reference.bias, reference.eps)
        padding = (0, x.shape[3] - w, 0, x.shape[2] - h)
        out = out + F.pad(own, padding)[0] * (torch.arange(len(x)) == number)[:, None, None, None]
    inputs = (image, *reference.parameters())
    return out, *torch.autograd.grad(out, inputs, weight.double())


@pytest.mark.parametrize("band", [1 << 17, 1, 100])
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("dtype", "beyond", "offset"),
    [
        (torch.float64, 1e9, 0.0),
        (torch.float32, 1e4, 0.0),
        (torch.float32, 0.0, 100.0),  # a mean far above the deviation
        (torch.bfloat16, 0.0, 0.0),
        (torch.float16, 0.0, 0.0),
    ],
    ids=str,
)
def test_what_is_inside_is_normalized_alone(
    dtype, beyond, offset, channels_last, affine, looks, band, monkeypatch
):
    """In both forms: where sizes may be looked at, and where not, as on a GPU."""
    monkeypatch.setattr(group_norm, "BAND", band)
    monkeypatch.setattr(group_norm, "PIXELS", band)
    if not looks:
        monkeypatch.setattr(norms_module, "cpu_shortcut", lambda x, backward: False)
    norm, x = image_norm(dtype, affine=affine), filled_up(dtype, beyond, offset)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = norm(x.requires_grad_(), inside())
    found = (out, *torch.autograd.grad(out, (x, *norm.parameters()), weight))
    assert out.dtype == dtype
    for mine, truth in zip(found, each_alone(norm, x, weight), strict=True):
        # What rounding the arguments of the definition alone changes, with room for the sums.
        error = 16 * torch.finfo(dtype).eps * (1 + offset) * truth.abs().max().clamp(min=1)
        assert (mine.double() - truth).abs().max() <= error


class Passes(TorchDispatchMode):
    """Counts the operations that read or write as many numbers as an image has, views aside."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out, *args) if isinstance(t, torch.Tensor)]
        self.count += max(sizes) == self.numbers and not func.is_view
        return out


@pytest.mark.cpu
def test_passes_over_an_image_that_may_not_be_looked_at():
    """Of which a GPU launches a kernel for each: 9 and 15 with one operation for each step."""
    x, norm = torch.empty(4, 12, 9, 13, device="meta", requires_grad=True), image_norm().to("meta")
    known = Inside(*(along.to("meta") for along in inside()))
    with Passes(x.numel()) as forward:
        out = norm(x, known)
    with Passes(x.numel()) as backward:
        out.backward(torch.empty_like(x))
    assert (forward.count, backward.count) == (7, 14)


def test_what_lies_outside_changes_no_bit_without_a_look(monkeypatch):
    monkeypatch.setattr(norms_module, "cpu_shortcut", lambda x, backward: False)
    norm, found = image_norm(), []
    for beyond in (0.0, 1e4, torch.nan):
        x = filled_up(torch.float32, beyond).requires_grad_()
        out = norm(x, inside())
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, *norm.parameters()))])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.cpu
@pytest.mark.parametrize("size", [1e15, 1e25, 1e37])
def test_squares_may_overflow(size):
    norm, x = image_norm(), (size * torch.randn(2, 12, 5, 7)).requires_grad_()
    found, truth = norm(x), copy.deepcopy(norm).double()(x.double())
    assert (found - truth).abs().max() <= 1e-5
    assert torch.autograd.grad(found.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 20.0, 1000.0])
def test_large_images_keep_their_digits(offset):
    """torch's own, in this memory format, is wrong by 0.0003, 0.05 and 3000."""
    norm = image_norm()
    x = offset + torch.randn(1, 12, 300, 400)
    x = x.contiguous(memory_format=torch.channels_last)
    found, truth = norm(x), copy.deepcopy(norm).double()(x.double())
    error = 16 * torch.finfo(torch.float32).eps * (1 + offset)  # of sums of such numbers
    assert (found - truth).abs().max() <= error


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("band", [1 << 17, 100])
def test_norm_and_relu_in_place(dtype, band, monkeypatch):
    """In evaluation, of what the convolution gives; padding is 0 in the result."""
    monkeypatch.setattr(group_norm, "BAND", band)
    monkeypatch.setattr(group_norm, "PIXELS", band)
    norm, x = image_norm(dtype).requires_grad_(False), filled_up(dtype, 1e4)
    truth = each_alone(copy.deepcopy(norm).requires_grad_(), x, x)[0].detach().relu()
    error = 16 * torch.finfo(dtype).eps * truth.max()
    found = norm.relu_(x, inside())
    assert found is x
    assert (found.double() - truth).abs().max() <= error
    whole = filled_up(dtype, 0.0)
    truth = copy.deepcopy(norm).double()(whole.double()).relu()
    assert (norm.relu_(whole).double() - truth).abs().max() <= error


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_pixel_is_normalized_by_itself(dtype, offset, channels_last, affine, padded):
    """Against the definition in float64, and 0 in the padding, from which nothing comes back."""
    norm, x = pixel_norm(dtype, affine), filled_up(dtype, 3.0, offset)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    known = inside() if padded else None
    out = norm(x.requires_grad_(), known)
    found = (out, *torch.autograd.grad(out, (x, *norm.parameters()), weight))
    reference, image = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    centred = image - image.mean(1, keepdim=True)
    truth = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    if affine:
        truth = truth * reference.weight[:, None, None] + reference.bias[:, None, None]
    if padded:
        truth = truth * ~known.outside()[:, None]
    arguments = (image, *reference.parameters())
    expected = (truth, *torch.autograd.grad(truth, arguments, weight.double()))
    assert out.dtype == dtype
    for mine, true in zip(found, expected, strict=True):
        # What rounding the arguments of the definition alone changes, with room for the sums.
        error = 16 * torch.finfo(dtype).eps * (1 + offset) * true.abs().max().clamp(min=1)
        assert (mine.double() - true).abs().max() <= error


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("band", [1 << 17, 100])
def test_norm_of_pixels_and_relu_in_place(dtype, band, monkeypatch):
    monkeypatch.setattr(group_norm, "BAND", band)
    norm = pixel_norm(dtype).requires_grad_(False)
    for known in (inside(), None):
        x = filled_up(dtype, 1e4).contiguous(memory_format=torch.channels_last)
        truth = norm(x, known).relu()
        found = norm.relu_(x, known)
        assert found is x
        torch.testing.assert_close(found, truth)


KEPT = {
    "convolution": lambda layer, keep: layer.conv.register_forward_hook(keep),
    "norm": lambda layer, keep: layer.norm.register_forward_hook(keep),
    "activation": lambda layer, keep: layer.act.register_forward_pre_hook(lambda m, x: keep(m, x)),
    "no convolution": lambda layer, keep: setattr(layer, "conv", nn.Identity()),
    "no affine": lambda layer, keep: setattr(layer, "norm", ImageNorm(4, 8, affine=False)),
}


@torch.no_grad()
@pytest.mark.parametrize("of_image", [True, False])
@pytest.mark.parametrize("what", KEPT)
def test_what_others_have_seen_is_not_overwritten(what, of_image):
    layer, kept = ConvNormAct(8, 8, 1, None, of_image).eval(), []
    image = torch.randn(2, 8, 6, 6)

    def keep(module, inputs, output=None):
        seen = inputs[0] if output is None else output
        kept.append((seen, seen.clone()))

    KEPT[what](layer, keep)
    original = image.clone()
    expected = F.relu(layer.norm(layer.conv(image)))
    kept.clear()
    assert torch.allclose(layer(image), expected, atol=1e-6)
    assert torch.equal(image, original)
    assert len(kept) == (not what.startswith("no "))
    if what != "activation":  # what a ReLU in place gets it does overwrite
        assert all(torch.equal(*pair) for pair in kept)


@pytest.mark.cpu
def test_second_derivatives_are_refused():
    x = torch.randn(1, 12, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(image_norm()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_only_what_is_asked_for_has_a_gradient():
    norm, x = ImageNorm(4, 12).requires_grad_(False), torch.randn(2, 12, 4, 5, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad.abs().max() < 1e-5  # the sum of each group is a constant


def test_a_pixel_has_a_variance():
    out = image_norm()(filled_up(torch.float32, 0.0), inside())
    assert out.isfinite().all()
    assert out[3, :, 0, 0].count_nonzero() == 12


# ---------------------------------------------------------------------------------- the backbone


@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
def test_training_and_evaluation_are_one_function_of_each_image(variant):
    """Not so of BatchNorm, whose statistics are of the batch, or of all that was trained on."""
    images = torch.randn(2, 3, 64, 96)
    images[1] += 3
    for norm_cfg, same in ((None, True), (BATCH_NORM, False)):
        model = backbone(variant, norm_cfg=norm_cfg, solver="direct")
        with torch.no_grad():
            together = model.train()(images)[2]
            alone = model(images[:1])[2]
            evaluated = model.eval()(images)[2]
        assert torch.allclose(together[:1], alone, atol=1e-4) == same
        assert torch.allclose(together, evaluated, atol=1e-4) == same


@pytest.mark.parametrize(
    ("channels", "groups"), [(32, 16), (96, 16), (320, 16), (24, 4), (8, 4), (6, 1), (7, 1), (1, 1)]
)
def test_groups(channels, groups):
    norm = ConvNormAct(3, channels, 2, None, of_image=True).norm
    assert (type(norm), norm.num_groups) == (ImageNorm, groups)


@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
def test_the_first_norm_is_of_the_image_the_others_of_each_pixel(variant):
    assert kinds(backbone(variant)) == DEFAULT


def test_group_norm_of_a_config_leaves_padding_out_too():
    cfg = dict(type="GN", num_groups=4, eps=1e-3, requires_grad=False)
    norm = ConvNormAct(3, 32, 2, cfg).norm
    assert (type(norm), norm.num_groups, norm.eps) == (ImageNorm, 4, 1e-3)
    assert not any(parameter.requires_grad for parameter in norm.parameters())


@pytest.mark.parametrize("how", ["load_state_dict", "load_backbone"])
def test_weights_decide(how, log, tmp_path):
    """Statistics make it BatchNorm, and what an optimizer knows are the same parameters."""
    model, source, image = backbone().train(), trained().eval(), torch.randn(1, 3, 96, 64)
    before = dict(model.named_parameters())
    if how == "load_state_dict":
        model.load_state_dict(source.state_dict())
    else:
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        load_backbone(model, str(tmp_path / "weights.pth"))
    assert all(type(norm) is nn.BatchNorm2d and norm.training for norm in norms(model))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        for mine, theirs in zip(model.eval()(image), source(image), strict=True):
            assert torch.equal(mine, theirs)
    (line,) = [line for line in log if "trained with BatchNorm" in line]
    assert line.startswith("SOFTPlusPlus: the weights were trained with BatchNorm")


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("landmarks", [None, "released"])
@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
def test_an_average_begun_before_weights_are_loaded(variant, landmarks, buffers, tmp_path):
    """As MMEngine's EMAHook does, which copies the model before a Runner initializes it."""
    source = trained(variant=variant, landmarks=landmarks, solver="direct").eval()
    path = str(tmp_path / "weights.pth")
    torch.save(source.state_dict(), path)
    init_cfg = dict(type="Pretrained", checkpoint=path)
    model = backbone(variant, solver="direct", init_cfg=init_cfg)
    average = ExponentialMovingAverage(model, update_buffers=buffers)
    model.init_weights()
    for _ in range(2):
        average.update_parameters(model)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(average.module.eval()(image), source(image), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_there_change_nothing(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    for name in ("missing.pth", "broken.pth"):
        cfg = dict(type="Pretrained", checkpoint=str(tmp_path / name))
        assert kinds(backbone(init_cfg=cfg)) == DEFAULT


def test_and_back():
    model, other, image = backbone(seed=2), backbone(seed=3), torch.randn(1, 3, 64, 64)
    model.load_state_dict(trained().state_dict())
    model.load_state_dict(other.state_dict())
    assert kinds(model) == DEFAULT
    with torch.no_grad():
        assert torch.equal(model(image)[3], other(image)[3])


@pytest.mark.parametrize("of_image", [True, False])
def test_a_switch_keeps_the_module(of_image):
    """And with it hooks, wrappers, and what an optimizer or a sharding knows of its parameters."""
    norm, seen = build_norm(None, 8, of_image), []
    default = type(norm)
    norm.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    norm.note, image = "of the user", torch.randn(2, 8, 3, 3)
    parameters = list(norm.parameters())
    for of_batch, kind in ((True, nn.BatchNorm2d), (False, default), (True, nn.BatchNorm2d)):
        assert become(norm, of_batch, of_image=of_image)
        assert not become(norm, of_batch, of_image=of_image)
        new = nn.BatchNorm2d(8) if of_batch else build_norm(None, 8, of_image)
        assert (type(norm), repr(norm)) == (kind, repr(new))
        assert norm.state_dict().keys() == new.state_dict().keys()
        assert torch.equal(norm(image), new(image))
        assert norm.note == "of the user"
        assert all(map(lambda mine, before: mine is before, norm.parameters(), parameters))
    assert seen == [nn.BatchNorm2d, default, nn.BatchNorm2d]


@pytest.mark.parametrize(
    "norm_cfg",
    [
        dict(type="GN", num_groups=4, eps=1e-3),
        dict(type="LN", eps=1e-3),
        dict(type="BN", eps=1e-2),
    ],
)
def test_what_the_weights_tell_of_their_norm(norm_cfg, log):
    """Groups and eps, which are in no tensor."""
    source, model, image = backbone(norm_cfg=norm_cfg), backbone(seed=2), torch.randn(1, 3, 64, 64)
    model.load_state_dict(source.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(image)[3], source.eval()(image)[3])
    kind = dict(GN="GroupNorm of 4 groups", LN="LayerNorm", BN="BatchNorm")[norm_cfg["type"]]
    assert any(f"trained with {kind} in the patch embeddings, which is used" in x for x in log)


@pytest.mark.parametrize(
    ("norm_cfg", "name"),
    [
        (dict(type="IN", affine=True), "InstanceNorm2d"),
        (dict(type="BN", track_running_stats=False), "BatchNorm without statistics"),
    ],
)
def test_weights_of_other_norms_are_not_taken_for_the_default(norm_cfg, name):
    source = backbone(norm_cfg=norm_cfg).state_dict()
    with pytest.raises(ValueError, match=rf"trained with {name} .*norm_cfg"):
        backbone().load_state_dict(source)
    backbone(norm_cfg=norm_cfg).load_state_dict(source)


def test_a_config_with_another_norm_than_the_weights_is_warned(log):
    backbone(norm_cfg=dict(type="GN", num_groups=4)).load_state_dict(backbone().state_dict())
    assert any("trained with GroupNorm of 16 groups" in line and "norm_cfg" in line for line in log)


NOTES = [None, "BN", {"stages.0.patch_embed.0": None}] + [
    {"stages.0.patch_embed.0": note}
    for note in (
        ("GroupNorm", 5, 1e-5), ("GroupNorm", 0, 1e-5), ("GroupNorm", True, 1e-5),
        ("GroupNorm", 8, 2.0), ("GroupNorm", 8, float("nan")), ("GroupNorm", None, 1e-5), (1, 2, 3),
    )
]  # fmt: skip


@pytest.mark.parametrize("notes", NOTES, ids=str)
def test_notes_that_make_no_sense_change_nothing(notes):
    model, source = backbone(), backbone(seed=2)
    weights = source.state_dict()
    weights._metadata[""]["patch_norms"] = notes
    expected = [repr(norm) for norm in norms(model)]
    model.load_state_dict(weights)
    assert [repr(norm) for norm in norms(model)] == expected


def test_a_part_of_the_weights_decides_for_its_part():
    model, source = backbone(), trained().state_dict()
    part = {k: v for k, v in source.items() if k.startswith("stages.1.patch_embed.")}
    missing, unexpected = model.load_state_dict(part, strict=False)
    assert unexpected == []
    assert not set(part) & set(missing)
    assert [type(norm) is nn.BatchNorm2d for norm in norms(model)] == [0, 0, 0, 1, 0, 0]


def test_statistics_that_are_missing_are_named():
    weights = trained().state_dict()
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        del weights[f"stages.1.patch_embed.0.norm.{key}"]
    with pytest.raises(
        RuntimeError, match=r"Missing key.*stages\.1\.patch_embed\.0\.norm\.running_mean"
    ):
        backbone().load_state_dict(weights)


def test_a_config_that_names_its_norm_is_obeyed():
    with pytest.raises(RuntimeError, match="running_mean"):
        backbone(norm_cfg=dict(type="GN", num_groups=4)).load_state_dict(trained().state_dict())
    with pytest.raises(RuntimeError, match="running_mean"):
        backbone(norm_cfg=BATCH_NORM).load_state_dict(backbone().state_dict())


def test_frozen_stages_stay_frozen():
    model = backbone(frozen_stages=1).train()
    model.load_state_dict(trained().state_dict())
    model.train()
    assert [norm.training for norm in norms(model)] == [False] * 3 + [True] * 3
    assert [norm.weight.requires_grad for norm in norms(model)] == [False] * 3 + [True] * 3


def test_norm_eval_holds_once_weights_are_loaded():
    model = backbone(norm_eval=True).train()
    model.load_state_dict(trained().state_dict())
    assert not any(norm.training for norm in norms(model))


def test_a_norm_of_ones_own_is_left_alone():
    model = backbone()
    model.stages[0].patch_embed[0].norm = nn.Identity()
    _, unexpected = model.load_state_dict(trained().state_dict(), strict=False)
    assert type(model.stages[0].patch_embed[0].norm) is nn.Identity
    assert {name.rpartition(".")[0] for name in unexpected} == {"stages.0.patch_embed.0.norm"}


@pytest.mark.cpu  # one rank with gloo, which needs no GPU
def test_weights_reach_a_model_that_is_sharded(tmp_path):
    """FSDP2 knows modules and parameters by what they were when it sharded them."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if before_torch("2.7"):
        pytest.skip("FSDP2 came with torch 2.6, which shards on GPUs alone")
    from torch.distributed.tensor import distribute_tensor

    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model, source = backbone(), trained().eval()
        fsdp.fully_shard(model, mesh=mesh)
        parameters, weights = dict(model.named_parameters()), source.state_dict()
        for name, own in parameters.items():
            weights[name] = distribute_tensor(weights[name], mesh, own.placements)
        model.load_state_dict(weights)
        image = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            for mine, theirs in zip(model.eval()(image), source(image), strict=True):
                torch.testing.assert_close(mine, theirs)
        model.train()(image)[3].sum().backward()
        assert all(own.grad is not None for own in model.stages[0].patch_embed.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_precision_and_copies():
    model = copy.deepcopy(backbone().double())
    model.load_state_dict(trained().double().state_dict())
    with torch.no_grad():
        assert (
            model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))[0].dtype == torch.float64
        )
    assert all(norm.running_mean.dtype == torch.float64 for norm in norms(model))
