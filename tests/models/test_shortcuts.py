"""Shortcuts of eager programs: taken where they pay, never traced, and the result is the same."""

import re
from functools import cache

import pytest
import torch
from operators import Calls, before_torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmsoft.models import attention as attention_module
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.layers import (
    ConvNormAct,
    Mlp,
    SOFTBlock,
    TanhGELU,
    as_image,
    stem,
)
from mmsoft.models.norms import ImageNorm
from mmsoft.ops import landmark_attention, landmark_candidates, softmax_free_attention


class Module(nn.Module):
    """A function of one tensor, with the module that it calls."""

    def __init__(self, function, module=None):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x):
        return self.function(self.module, x)


def attention():
    return SoftmaxFreeAttention(16, 2, 2, 3, normalize=True, solver="direct")


def block():
    block = SOFTBlock(16, attention(), 0.0, 0.0)
    block.part_elements = 100
    return block


def banded_stem():
    banded = stem(3, 8, dict(type="BN"))
    banded.band_elements = 100
    return banded


def not_in_place(of_image):
    layer = ConvNormAct(16, 8, 1, None, of_image)
    layer.act = nn.ReLU()  # not in place itself
    return layer


def by_content():
    layer = SoftmaxFreeAttention(16, 2, 2, 3, normalize=True, landmarks="content", max_landmarks=3)
    block = SOFTBlock(16, layer, 0.0, 0.0)
    block.part_elements = 100
    return block


# What computes, with which module; shape of x, where the shortcut is taken, and the operation that
# then is called or not.
EVALUATION, CPU, EAGER = ("eval",), ("eval", "grad"), ("eval", "grad", "meta")
TOKENS = (2, 30, 16)
SHORTCUTS = {
    "stored kernel": (
        lambda m, x: softmax_free_attention(x, x, x[:, :, :3], solver="direct"), lambda: None,
        (2, 2, 30, 8), EVALUATION, "gaussian_kernel_product", False,
    ),
    "transposition": (
        lambda m, x: as_image(x, (5, 6)), lambda: None, TOKENS, CPU, "stack", True,
    ),
    "sigmoid": (lambda m, x: m(x), TanhGELU, TOKENS, EVALUATION, "sigmoid_", True),
    "parts": (
        lambda m, x: m.tokenwise(m._after_attention, x, x), block,
        TOKENS, EVALUATION, "split", True,
    ),
    "sum in place": (lambda m, x: m(x, (5, 6)), attention, TOKENS, EVALUATION, "add_", True),
    "scaled product": (
        lambda m, x: torch.cat(m.queries_and_values(x)), attention, TOKENS, EAGER, "mul", False,
    ),
    "attention by part": (
        lambda m, x: m(x, (5, 6)), by_content, TOKENS, EVALUATION, "split", True,
    ),
    "no clamped copy": (
        lambda m, x: landmark_attention(
            *(t.transpose(1, 2) for t in (x, x, x[:, :3]))
        ).contiguous(),
        lambda: None, (1, 30, 2, 8), CPU, "hardtanh", False,
    ),
    "fused linear": (
        lambda m, x: m(x), lambda: Mlp(16, TanhGELU(), 0.1),
        TOKENS, EVALUATION, "_linear_pointwise", True,
    ),
    "bands": (
        # as below
        lambda m, x: m(x.to(memory_format=torch.channels_last)).sum((2, 3)), banded_stem,
        (2, 3, 20, 20), EVALUATION, "constant_pad_nd", True,
    ),
    "norm in bands": (
        lambda m, x: m(x.to(memory_format=torch.channels_last)).sum((2, 3)),
        lambda: ImageNorm(4, 16), (2, 16, 5, 6), CPU, "addcmul", True,
    ),
    "norm in place": (
        lambda m, x: m(x.to(memory_format=torch.channels_last)).sum((2, 3)),
        lambda: not_in_place(True), (2, 16, 5, 6), EVALUATION, "relu_", True,
    ),
    "norm of pixels in place": (
        lambda m, x: m(x.to(memory_format=torch.channels_last)).sum((2, 3)),
        lambda: not_in_place(False), (2, 16, 5, 6), EVALUATION, "relu_", True,
    ),
    "candidates in bands": (
        lambda m, x: landmark_candidates(x, (5, 6), 2, 2, x.mean(1).view(2, 2, 8)), lambda: None,
        TOKENS, EAGER, "avg_pool2d", True,
    ),
    "folded norm": (
        lambda m, x: m(x), lambda: ConvNormAct(3, 8, 2, dict(type="BN")),
        (2, 3, 20, 20), EAGER, ".*batch_norm.*", False,
    ),
    "layout of a small image": (
        # torch gives other strides on "meta" than on a CPU: those of evaluation are checked below
        lambda m, x: m(x.to(memory_format=torch.channels_last)).sum((2, 3)),
        lambda: ConvNormAct(32, 64, 2, dict(type="BN")), (2, 32, 5, 6), EVALUATION, "clone", True,
    ),
}  # fmt: skip


def of_graph(program) -> set[str]:
    """Of a program, with the parts that it calls, such as those without autocast."""
    nodes = [n for m in program.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    names = (getattr(node.target, "__name__", str(node.target)) for node in nodes)
    return {name.partition(".")[0] for name in names}


def run(module, x):
    with Calls() as calls:
        out = module(x)
    return calls.names, out


def on_meta(module, x):
    return run(module.to("meta"), x.to("meta"))


def fake(module, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return run(module, mode.from_tensor(x))


def compiled(module, x):
    if before_torch("2.6"):
        pytest.skip("one graph needs torch >= 2.6")
    torch._dynamo.reset()
    called = set()

    def note(program, inputs):
        called.update(of_graph(program))
        return program.forward

    return called, torch.compile(module, fullgraph=True, backend=note)(x)


def exported(module, x):
    if before_torch("2.6"):
        pytest.skip("torch.export needs torch >= 2.6")
    program = torch.export.export(module, (x,)).module()
    return of_graph(program), program(x)


def scripted(module, x):
    program = torch.jit.trace(module, x)
    return set(re.findall(r"\w+::(\w+)", str(program.inlined_graph))), program(x)


def functional(module, x):
    program = make_fx(module)(x)
    return of_graph(program), program(x)


CONDITIONS = {
    "eval": run,
    "grad": run,
    "meta": on_meta,
    "fake": fake,
    "compile": compiled,
    "export": exported,
    "jit": scripted,
    "make_fx": functional,
}


def module_and_input(name):
    function, build, shape, *_ = SHORTCUTS[name]
    torch.manual_seed(0)
    return Module(function, build()).eval(), torch.randn(shape)


@cache
@torch.no_grad()
def result(name):
    return compiled(*module_and_input(name))[1]


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", SHORTCUTS)
def test_taken_in_eager_programs_alone_and_the_result_is_the_same(name, condition):
    *_, where, operation, is_called = SHORTCUTS[name]
    expected, (module, x) = result(name), module_and_input(name)
    with torch.set_grad_enabled(condition == "grad"):
        called, out = CONDITIONS[condition](module, x)
    found = any(re.fullmatch(operation, name) for name in called)
    assert (found is is_called) is (condition in where)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())
    if condition not in ("meta", "fake"):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 7), (40, 40)])  # fewer and more numbers than the weight has
def test_patch_embeddings_keep_the_layout(size):
    image = torch.randn(2, 32, *size).to(memory_format=torch.channels_last)
    out = ConvNormAct(32, 64, 2, dict(type="BN")).eval()(image)
    assert out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_training_without_gradients_takes_all_tokens_at_once(monkeypatch):
    """Stochastic depth is drawn for a sample, not for each part of its tokens."""
    shapes, after = [], SOFTBlock._after_attention
    monkeypatch.setattr(
        SOFTBlock, "_after_attention", lambda self, *t: shapes.append(t[0].shape) or after(self, *t)
    )
    block().train()(torch.randn(TOKENS), (5, 6))
    assert shapes == [TOKENS]


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_read_landmarks_by_part(monkeypatch, batch, autocast):
    """Of one sample at a time; whole where a block is hooked, trains, or has released landmarks."""
    sizes, read = [], attention_module.read_landmarks
    monkeypatch.setattr(
        attention_module, "read_landmarks", lambda q, m: sizes.append(q.shape) or read(q, m)
    )
    torch.manual_seed(0)
    layer = SoftmaxFreeAttention(
        16, 2, 2, 3, normalize=True, landmarks="content", max_landmarks=3, solver="direct"
    )
    block = SOFTBlock(16, layer, 0.0, 0.0).eval()
    block.part_elements = 16 * 8
    x = torch.randn(batch, 30, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x, (5, 6))
        assert sizes == batch * [(1, 2, n, 8) for n in (8, 8, 8, 6)]
        hook = layer.register_forward_hook(lambda *args: None)
        whole = block(x, (5, 6))
        hook.remove()
        block.train()(x, (5, 6))
        layer.use_landmarks("released")
        block.eval()(x, (5, 6))
        layer.use_landmarks("content")
        for method in ("attend", "operate"):  # as who changes them does
            setattr(layer, method, getattr(layer, method))
            block(x, (5, 6))
            delattr(layer, method)
        layer.__class__ = type("Other", (SoftmaxFreeAttention,), {})
        block(x, (5, 6))
    assert len(sizes) == 4 * batch
    assert out.dtype == whole.dtype
    tolerance = dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, whole, **tolerance)


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("size", [(33, 47), (64, 5), (5, 64), (1, 90), (90, 1), (66, 66)])
@pytest.mark.parametrize("elements", [1, 700])  # bands of one row, and of several
def test_bands_join(size, elements):
    torch.manual_seed(0)
    module = stem(3, 8, dict(type="BN")).eval()
    for layer in module:
        nn.init.uniform_(layer.norm.running_mean)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2)
        nn.init.uniform_(layer.norm.bias)
    x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
    whole = module(x)
    module.band_elements = elements
    with Calls() as calls:
        out = module(x)
    assert "constant_pad_nd" in calls.names
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
@torch.no_grad()
def test_a_band_is_of_one_sample():
    """However many there are: a band of all would be a row or less."""
    module = stem(3, 8, dict(type="BN")).eval()
    module.band_elements = 32 * 20 * 20
    x, sizes = torch.randn(7, 3, 40, 40), []
    relu = nn.ReLU.forward
    with pytest.MonkeyPatch.context() as patch:

        def noted(self, x):
            sizes.append(tuple(x.shape[:3]))
            return relu(self, x)

        noted_layer = module[2].act
        patch.setattr(type(noted_layer), "forward", noted)
        whole = torch.cat([module(sample[None]) for sample in x])
        sizes.clear()
        out = module(x)
    assert sizes == 7 * [(1, 32, 20), (1, 32, 20), (1, 8, 10)]
    torch.testing.assert_close(out, whole)
    with torch.device("meta"):
        assert module(x).device.type == "cpu"
    assert len(module[:2]) == 2


CHANGES = {  # of the stem's second layer
    "groups": lambda layer: setattr(layer, "conv", nn.Conv2d(32, 32, 3, padding=1, groups=2)),
    "kernel": lambda layer: setattr(layer, "conv", nn.Conv2d(32, 32, 5, padding=1)),
    "strides": lambda layer: setattr(layer, "conv", nn.Conv2d(32, 32, 3, (1, 2), padding=1)),
    "other activation": lambda layer: setattr(
        layer, "act", nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(32))
    ),
    "dilation": lambda layer: setattr(layer.conv, "dilation", (2, 2)),
    "padding": lambda layer: setattr(layer.conv, "padding", (0, 0)),
    "padding_mode": lambda layer: setattr(layer.conv, "padding_mode", "circular"),
    "norm in training": lambda layer: layer.norm.train(),
    "hook": lambda layer: layer.act.register_forward_hook(lambda *args: None),
    "other norm": lambda layer: setattr(layer, "norm", nn.GroupNorm(4, 32)),
}


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_no_bands_of_other_convolutions(change):
    module = banded_stem().eval()
    CHANGES[change](module[1])
    with Calls() as calls:
        module(torch.randn(1, 3, 40, 40))
    assert "constant_pad_nd" not in calls.names


def test_every_shortcut_is_here(root):
    sources = (path for path in (root / "mmsoft").rglob("*.py") if path.name != "mode.py")
    texts = [path.read_text() for path in sources]
    asks = r"\b(?:cpu_shortcut|traced|may_decide)\("
    asking = [re.findall(asks, text) for text in texts]
    # The warning of many landmarks, the gradients of those that are idle, of the choice inside its
    # operator, which tests/ops/test_choice.py compares, the two forms, when it stops and what it
    # stores, and of sequences whether there is padding, whether those of one length are computed
    # together (tests/models/test_sequence.py) and whether tokens are known; of images
    # whether they are padded and whether that may be cut off (tests/models/test_image_padding.py),
    # how every second row and whole patches are taken and whether a patch has a mask, and how stage
    # 4's result lies where it has one (tests/export).
    others = 14
    # tokens by part, with and without what they read from landmarks; both norms in place
    twice = 2
    assert sum(map(len, asking)) == len(SHORTCUTS) - twice + others
    # by another condition
    assert not [text for text in texts if re.search(r"is_compiling|is_dynamo|\.is_cpu", text)]
