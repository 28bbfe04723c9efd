"""What fills up a batch is not read: by landmarks, means, keys of stage 4, norms."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from on_device import device_type
from operators import FLOAT16, before_torch, needs_torch_2_6

from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from mmsoft.models.layers import _weights, pos_embed_inside, resize_pos_embed
from mmsoft.models.norms import ImageNorm
from mmsoft.models.padding import Inside, inside

ARCH = dict(embed_dims=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(sizes, height, width, seed=0):
    """A batch of images of such sizes, filled up as OpenMMLab's preprocessors do."""
    images = torch.zeros(len(sizes), 3, height, width)
    for image, (h, w) in zip(images, sizes):
        image[:, :h, :w] = normal(3, h, w, seed=seed)
    return images


def within(sizes, height, width):
    rows, cols = (torch.tensor(each)[:, None] for each in zip(*sizes))
    return Inside(torch.arange(height) < rows, torch.arange(width) < cols)


# ------------------------------------------------------------------------------------ finding it


def test_rows_and_columns_of_zeros_at_the_end_are_padding():
    sizes = [(64, 96), (50, 96), (64, 33), (7, 1)]
    found = inside(padded(sizes, 64, 96))
    expected = within(sizes, 64, 96)
    assert all(map(torch.equal, found, expected))
    assert found.tokens().sum(1).tolist() == [h * w for h, w in sizes]


@pytest.mark.cpu
def test_a_batch_without_padding_is_told_at_a_glance(monkeypatch):
    images = padded([(64, 96)] * 2, 64, 96)
    images[:, :, 20:40] = 0  # zeros within are none
    assert inside(images) is None
    images[1, :, -1] = 0
    images[1, 0, -1, 5] = 1e-30
    assert inside(images) is None
    images[1, 0, -1, 5] = 0
    assert inside(images).rows.sum(1).tolist() == [64, 63]


def test_an_image_of_zeros_is_an_image():
    images = padded([(64, 96), (64, 96)], 64, 96)
    images[1] = 0
    assert all(part.all() for part in inside(images))


def test_on_another_device_nothing_is_looked_at():
    found = inside(torch.empty(2, 3, 64, 96, device="meta"))
    assert [part.shape for part in found] == [(2, 64), (2, 96)]


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_grids_of_tokens_are_those_of_the_image_alone(step):
    """As many rows and columns inside as the image has by itself."""
    for h in (31, 32, 33, 60, 95):
        part = within([(h, 40)], 96, 64).every(step)
        assert part.rows.shape == (1, 96 // step)
        assert part.rows.sum() == -(-h // step)
        assert part.cols.sum() == -(-40 // step)


def test_patches_are_whole_or_the_first():
    part = within([(20, 12), (16, 3), (7, 24)], 24, 26)
    found = part.patches(8).unflatten(1, (3, 3))
    assert found.sum((1, 2)).tolist() == [2, 2, 3]
    assert found[:, 0, 0].all()
    assert within([(2, 3)], 4, 5).patches(8).tolist() == [[True]]


# ----------------------------------------------------------------------------------- the layers

SIZES = [(24, 32), (16, 24), (24, 8), (3, 24), (2, 3), (1, 1)]  # some smaller than a patch
GRID = (24, 32)


def attention(**options):
    torch.manual_seed(0)
    attn = SoftmaxFreeAttention(32, 2, 4, 5, normalize=True, landmarks="content", **options)
    torch.nn.init.normal_(attn.query.weight, std=0.3)
    return attn


def tokens(seed, beyond):
    """``[B, H*W, C]``, ``beyond`` outside the images."""
    x = normal(len(SIZES), *GRID, 32, seed=seed)
    for image, (h, w) in zip(x, SIZES):
        image[h:], image[:, w:] = beyond, beyond
    return x.flatten(1, 2)


@pytest.mark.parametrize("budget", [6, None])
@pytest.mark.parametrize("beyond", [0.0, -3.0, 1e6])
def test_the_attention_term_is_that_of_the_image_alone(budget, beyond):
    """And its gradients, whatever the padding holds."""
    attn = attention(max_landmarks=budget)
    q, v = (tokens(seed, beyond).requires_grad_() for seed in (0, 1))
    weight = normal(*q.shape, seed=2) * within(SIZES, *GRID).tokens()[:, :, None]
    out = attn.attend(q, v, GRID, within(SIZES, *GRID))
    grads = torch.autograd.grad(out, (q, v), weight)
    for number, (h, w) in enumerate(SIZES):
        alone = [
            t[number].detach().unflatten(0, GRID)[:h, :w].flatten(0, 1)[None].requires_grad_()
            for t in (q, v)
        ]
        own = attn.attend(*alone, (h, w))
        expected = (own, *torch.autograd.grad(own, alone, crop(weight, number)))
        for found, truth in zip((out, *grads), expected):
            torch.testing.assert_close(crop(found, number), truth, rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


def crop(t, number):
    h, w = SIZES[number]
    return t[number].unflatten(0, GRID)[:h, :w].flatten(0, 1)[None]


@pytest.mark.parametrize("max_keys", [None, 2048])
def test_stage_4_reads_from_the_image_alone(max_keys):
    torch.manual_seed(0)
    attn = SoftmaxAttention(32, 2, max_keys=max_keys)
    image, token = tokens(0, 9.0), normal(len(SIZES), 1, 32, seed=1)
    out = attn(torch.cat((token, image), 1), GRID, within(SIZES, *GRID))
    for number, size in enumerate(SIZES):
        alone = attn(torch.cat((token[number : number + 1], crop(image, number)), 1), size)
        torch.testing.assert_close(out[number, :1], alone[0, :1])
        torch.testing.assert_close(crop(out[:, 1:], number), alone[:, 1:])


def test_means_of_stage_4_are_of_the_image_alone():
    """Where there are many keys: means over what is inside, which count as so many tokens."""
    torch.manual_seed(0)
    attn = SoftmaxAttention(32, 2, max_keys=16)
    x = torch.cat((normal(len(SIZES), 1, 32, seed=1), tokens(0, 9.0)), 1)
    keys, bias = attn._keys(x, GRID, within(SIZES, *GRID))
    assert (keys.shape, bias.shape) == ((len(SIZES), 17, 32), (len(SIZES), 1, 1, 17))
    for number, (h, w) in enumerate(SIZES):
        image = x[number, 1:].unflatten(0, GRID)
        for row in range(4):
            for col in range(4):  # windows of 6x8 tokens
                part = image[6 * row : min(6 * row + 6, h), 8 * col : min(8 * col + 8, w)]
                key = 1 + 4 * row + col
                count = part[..., 0].numel()
                assert bias[number, 0, 0, key].exp().item() == pytest.approx(count, rel=1e-5)
                if count:
                    mean = part.flatten(0, 1).mean(0)
                    torch.testing.assert_close(keys[number, key], mean, rtol=1e-4, atol=1e-5)
    assert attn(x, GRID, within(SIZES, *GRID)).isfinite().all()


# --------------------------------------------------------------------------------- the backbone


def backbone(**options):
    torch.manual_seed(0)
    model = SOFTPlusPlus(ARCH, **options)
    for module in model.modules():
        if isinstance(module, SoftmaxFreeAttention):
            torch.nn.init.normal_(module.value.weight, std=0.3)  # the term counts
    for stage in model.stages:
        torch.nn.init.normal_(stage.pos_embed)
    return model.eval()


def dim(height, width):
    """Dark, as most microscope images: grey padding is unlike everything in it."""
    return 0.1 * normal(1, 3, height, width) - 2


def change(model, images, by):
    """Of features, relative, 64 pixels and more away from the border of the image."""
    with torch.no_grad():
        alone = model(images)[2]
        there = model(F.pad(images, (0, by, 0, by)))[2][..., : alone.shape[2], : alone.shape[3]]
    return float(((there - alone).norm(dim=1) / alone.norm(dim=1))[..., :-4, :-4].mean())


@pytest.mark.parametrize("size", [192, 200, 100, 77])
def test_padding_leaves_the_features_of_the_image_alone(size):
    """Whatever the parity of the grids, where two sizes meet and nothing can be cut off."""
    images = dim(size, size).double()
    mate = normal(1, 3, size + 64, size + 64).double()
    model = backbone().double()
    with torch.no_grad():
        alone = model(images)
        together = model(torch.cat((F.pad(images, (0, 64, 0, 64)), mate)))
    for own, both in zip(alone, together):
        there = both[:1, :, : own.shape[2], : own.shape[3]]
        torch.testing.assert_close(there, own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", ["patch_embed", "layer", "conv"])
def test_what_takes_the_place_of_a_patch_embedding_need_not_know_of_it(where):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = backbone()
    stage = model.stages[0]
    if where == "patch_embed":
        stage.patch_embed = Wrapper(stage.patch_embed)
    elif where == "layer":
        stage.patch_embed[0] = Wrapper(stage.patch_embed[0])
    else:
        stage.patch_embed[0].conv = Wrapper(stage.patch_embed[0].conv)
    with torch.no_grad():
        found = model(padded([(60, 50), (64, 40)], 64, 64))
    assert [out.shape[2:] for out in found] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_soft_has_padding_out_of_its_norm_alone():
    torch.manual_seed(0)
    model = SOFT(ARCH, solver="direct").eval()
    images = dim(96, 96)
    with torch.no_grad():
        stem = model.stages[0].patch_embed
        seen = []
        stem.register_forward_hook(lambda module, args, out: seen.append(out))
        model(images)
        model(F.pad(images, (0, 32, 0, 32)))
    torch.testing.assert_close(seen[1][:, :, :24, :24], seen[0], rtol=1e-4, atol=1e-4)


def test_padding_costs_the_features_what_they_read_of_it():
    images = dim(192, 192).double()
    ignored, seen = (
        change(backbone(ignore_padding=flag).double(), images, 64) for flag in (True, False)
    )
    assert ignored < 1e-10
    assert seen > 0.02


@pytest.mark.parametrize("sizes", [[(8, 12), (5, 12), (1, 1), (8, 3)], [(3, 4)], [(2, 2)]])
def test_position_embeddings_are_those_of_the_image(sizes):
    """And their gradient, in a grid of 3x4 for which they are kept."""
    pos_embed = normal(1, 12, 16).double().requires_grad_()
    there = within(sizes, 8, 12)
    weight = normal(len(sizes), 8, 12, 16, seed=1).double() * ~there.outside()[..., None]
    found = pos_embed_inside(pos_embed, (3, 4), there).unflatten(1, (8, 12))
    total = 0
    for number, (h, w) in enumerate(sizes):
        alone = resize_pos_embed(pos_embed, (3, 4), (h, w))[0].unflatten(0, (h, w))
        torch.testing.assert_close(found[number, :h, :w], alone, rtol=1e-12, atol=1e-12)
        total = total + (alone * weight[number, :h, :w]).sum()
    (gradient,) = torch.autograd.grad(total, pos_embed)
    (mine,) = torch.autograd.grad(found, pos_embed, weight)
    torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=1e-12)


def test_position_embeddings_keep_their_digits():
    """A place is rounded once."""
    sizes, size = torch.tensor([40, 37, 20, 27, 1])[:, None], 56
    there = torch.arange(40) < sizes
    found, truth = (
        _weights(there, size, torch.zeros(1, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert (found - truth).abs().max() <= torch.finfo(torch.float32).eps * size / 2


def test_batch_norm_lets_it_in_at_the_border():
    images = dim(192, 192)
    ignored, seen = (
        change(backbone(ignore_padding=flag, norm_cfg=dict(type="BN")), images, 64)
        for flag in (True, False)
    )
    assert 1e-4 < ignored < 0.15 * seen


@pytest.mark.cpu
@pytest.mark.parametrize("size", [(64, 96), (200, 333)])
def test_without_padding_nothing_changes(size):
    images = normal(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(backbone()(images), backbone(ignore_padding=False)(images)):
            assert torch.equal(a, b)


def test_an_image_does_not_depend_on_those_it_is_padded_with():
    images = padded([(192, 160), (128, 200)], 192, 224)
    model = backbone()
    with torch.no_grad():
        for number in range(2):
            for both, one in zip(model(images), model(images[number : number + 1])):
                torch.testing.assert_close(both[number], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16, torch.float64], ids=str)
def test_padding_in_other_precision(dtype):
    """Under autocast the error is that of images without padding; in float64 there is none."""
    images = padded([(192, 160), (128, 200)], 192, 224)
    model = backbone()
    with torch.no_grad():
        expected = model(images)
        if dtype == torch.float64:
            found = model.double()(images.double())
        else:
            with torch.autocast(device_type(), dtype):
                found = model(images)
    for a, b in zip(found, expected):
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("train", [True, False])
def test_no_device_is_asked_for_a_value(train):
    """None can be had on "meta", as on a GPU while a graph is captured."""
    with torch.device("meta"):
        model = SOFTPlusPlus(ARCH).train(train)
        images = torch.empty(2, 3, 200, 333)
    with torch.set_grad_enabled(train):
        outs = model(images)
        if train:
            sum(out.sum() for out in outs).backward()
    assert [out.shape[2:] for out in outs] == [(50, 84), (25, 42), (13, 21), (7, 11)]


@pytest.mark.parametrize("form", ["parts", "grad", "checkpoint", "compile"])
def test_every_form_of_the_program_ignores_it(form):
    """Evaluation part by part, with a backward pass, recomputed, and compiled."""
    if form == "compile" and before_torch("2.6"):
        pytest.skip("one graph needs torch >= 2.6")
    images = padded([(288, 300), (320, 200)], 320, 320)
    with torch.no_grad():
        model = backbone()
        model.stages[0].blocks[0].part_elements = 1 << 30  # as a whole
        expected = model(images)
    model = backbone(with_cp=form == "checkpoint")
    with torch.set_grad_enabled(form in ("grad", "checkpoint")):
        if form == "compile":
            torch._dynamo.reset()
            model = torch.compile(model, fullgraph=True, backend="eager")
        found = model(images)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if form in ("grad", "checkpoint"):
        sum(a.sum() for a in found).backward()


@pytest.mark.cpu
@needs_torch_2_6
def test_compiled_programs_recompute_blocks_that_ignore_it():
    """The compiler can record no change of what a recomputed block was handed."""
    images, found = padded([(60, 64), (64, 50)], 64, 64), []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = backbone(with_cp=True, out_indices=(0,))
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        out = run(images)[0]
        out.sum().backward()
        found.append((out, model.stages[0].blocks[0].attn.query.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@needs_torch_2_6
@pytest.mark.parametrize("landmarks", ["content", "released"])
def test_exported_programs_leave_it_out(landmarks):
    """Where the model does; recorded with images that have none."""
    model = backbone(landmarks=landmarks)
    program = torch.export.export(model, (normal(2, 3, 96, 96),)).module()
    images = padded([(60, 96), (96, 50)], 96, 96)
    with torch.no_grad():
        for a, b in zip(program(images), model(images)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        seen = backbone(landmarks=landmarks, ignore_padding=False)(images)[3]
        assert not torch.allclose(a, seen, rtol=1e-3, atol=1e-3)


@needs_torch_2_6
def test_autocast_does_not_reach_means_of_exported_programs():
    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = ImageNorm(2, 8)

        def forward(self, x, rows, cols):
            inside = Inside(rows, cols)
            return inside.mean(x.flatten(2).mT), self.norm(x, inside)

    model = Means()
    arguments = 3 + normal(2, 8, 16, 24), *within([(16, 24), (9, 20)], 16, 24)
    with torch.no_grad():
        truth = model.double()(arguments[0].double(), *arguments[1:])
    model.float()
    with torch.autocast(device_type(), torch.bfloat16):
        program = torch.export.export(model, arguments).module()
        found = program(*arguments)
    for ours, exact in zip(found, truth):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@needs_torch_2_6
def test_programs_are_recorded_on_the_meta_device():
    """Which knows no autocast."""
    model, images = backbone().to("meta"), torch.empty(2, 3, 96, 96, device="meta")
    program = torch.export.export(model, (images,)).module()
    assert [out.shape for out in program(images)] == [out.shape for out in model(images)]


@pytest.mark.cpu
@needs_torch_2_6
def test_exported_programs_do_not_look_for_it_in_vain():
    released = dict(landmarks="released", norm_cfg=dict(type="BN"))
    for options in (released, dict(ignore_padding=False)):
        program = torch.export.export(backbone(**options), (normal(1, 3, 64, 64),), strict=False)
        first = next(iter(program.graph.find_nodes(op="placeholder", target="x")))
        assert len(first.users) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_programs_see_it():
    """FLOPs are counted with them, those of an image alone."""
    images = padded([(60, 64), (64, 50)], 64, 64)
    with torch.no_grad():
        program = torch.jit.trace(backbone(), images)
        for a, b in zip(program(images), backbone(ignore_padding=False)(images)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(a, backbone()(images)[3], rtol=1e-3, atol=1e-3)


def test_released_landmarks_and_batch_norm_see_it_as_released():
    images = F.pad(dim(96, 96), (0, 32, 0, 32))
    released = dict(landmarks="released", norm_cfg=dict(type="BN"))
    with torch.no_grad():
        for a, b in zip(
            backbone(**released)(images),
            backbone(**released, ignore_padding=False)(images),
        ):
            assert torch.equal(a, b)


class OwnForward(SoftmaxFreeAttention):
    def forward(self, x, hw_shape):
        return super().forward(x, hw_shape)


class OwnAttend(SoftmaxFreeAttention):
    def attend(self, q, v, hw_shape):
        return super().attend(q, v, hw_shape)


class OwnLandmarks(SoftmaxFreeAttention):
    def sample_landmarks(self, q, hw_shape):
        return super().sample_landmarks(q, hw_shape)


class AsWell(SoftmaxFreeAttention):
    def attend(self, q, v, hw_shape, inside=None):
        return super().attend(q, v, hw_shape, inside)


class Operate(SoftmaxFreeAttention):
    def operate(self, *args, **options):
        return super().operate(*args, **options)


class Wrapper(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = SoftmaxFreeAttention(**options)

    def forward(self, x, hw_shape):
        return self.layer(x, hw_shape)


@pytest.mark.parametrize("own", [OwnForward, OwnAttend, OwnLandmarks, AsWell, Operate, Wrapper])
def test_an_attention_of_ones_own_need_not_know_of_it(own):
    """It sees padding, then."""

    class Own(SOFTPlusPlus):
        def build_attention(self, **options):
            return own(**options)

    def features(variant, ignore_padding):
        torch.manual_seed(0)
        model = variant(ARCH, ignore_padding=ignore_padding, norm_cfg=dict(type="BN"))
        for module in model.modules():
            if isinstance(module, SoftmaxAttention):
                module.takes_padding = False
        for stage in model.stages:
            torch.nn.init.zeros_(stage.pos_embed)  # which are those of the image, whoever attends
        with torch.no_grad():
            return model.eval()(padded([(60, 50)], 64, 64))[2]

    knows = own in (AsWell, Operate)
    assert torch.equal(features(Own, True), features(SOFTPlusPlus, knows))
    assert not torch.equal(features(SOFTPlusPlus, True), features(SOFTPlusPlus, False))


@pytest.mark.cpu
def test_what_the_operator_is_replaced_by_is_called_with_padding(monkeypatch):
    model = backbone()
    calls = []
    layer = model.stages[0].blocks[0].attn
    operate = layer.operate
    monkeypatch.setattr(layer, "operate", lambda *a, **k: (calls.append(k), operate(*a, **k))[1])
    with torch.no_grad():
        model(padded([(60, 50), (64, 40)], 64, 64))
        model(padded([(60, 50), (60, 50)], 64, 64))  # without what is padding of all
    assert calls[0]["mask"].tokens().shape == (2, 16 * 13)
    assert int(calls[0]["mask"].tokens().sum()) == 15 * 13 + 16 * 10
    assert calls[1].get("mask") is None


def test_features_of_padding_are_zero():
    """Whether it is cut off, as on a CPU, or not, as on a GPU and where a layer sees padding."""
    images = padded([(60, 50), (40, 64)], 96, 96)
    sizes = [(15, 13), (10, 16)]
    sees = backbone()
    sees.stages[2].blocks[0].attn.takes_padding = False
    for model in (backbone(), sees):
        with torch.no_grad():
            features = model(images)
        assert [out.shape[2:] for out in features] == [(24, 24), (12, 12), (6, 6), (3, 3)]
        for number, (h, w) in enumerate(sizes):
            for level, out in enumerate(features):
                rows, cols = (-(-side // 2**level) for side in (h, w))
                assert out[number, :, :rows, :cols].count_nonzero() == out[0, :, :1, :1].numel() * (
                    rows * cols
                )
                assert not out[number, :, rows:].any()
                assert not out[number, :, :, cols:].any()


def test_one_layer_by_content_is_enough():
    model = backbone()
    model.stages[0].blocks[0].attn = torch.nn.Identity()
    model.stages[0].blocks[0].attn.forward = lambda x, hw_shape: x
    seen = backbone(ignore_padding=False)
    seen.stages[0].blocks[0].attn = model.stages[0].blocks[0].attn
    with torch.no_grad():
        images = padded([(60, 50)], 64, 64)
        assert not torch.equal(model(images)[1], seen(images)[1])


def test_the_option_is_checked():
    with pytest.raises(TypeError, match="ignore_padding must be True or False, got 1"):
        SOFTPlusPlus(ARCH, ignore_padding=1)


@pytest.mark.cpu
def test_a_detector_sees_each_image_of_a_batch_as_if_alone():
    """Through MMDetection's preprocessor, which normalizes and fills up."""
    pytest.importorskip("mmdet")
    import mmdet.models  # noqa: F401

    preprocessor = MODELS.build(
        dict(
            type="mmdet.DetDataPreprocessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            pad_size_divisor=32,
        )
    )
    sizes = [(3, 90, 120), (3, 120, 100)]
    images = [torch.randint(0, 40, size, dtype=torch.uint8) for size in sizes]
    images[1][:, -9:] = 0  # black is not padding
    batch = preprocessor(dict(inputs=images, data_samples=None))["inputs"]
    assert batch.shape == (2, 3, 128, 128)
    found = inside(batch)
    assert found.rows.sum(1).tolist() == [90, 120]
    assert found.cols.sum(1).tolist() == [120, 100]


@pytest.mark.parametrize("landmarks", ["content", "released"])
def test_an_empty_batch_where_no_size_may_be_looked_at(landmarks):
    with torch.device("meta"):
        model, images = backbone(landmarks=landmarks).eval(), torch.empty(0, 3, 64, 96)
        assert [out.shape[::2] for out in model(images)] == [(0, side) for side in (16, 8, 4, 2)]
