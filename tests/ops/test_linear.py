"""Linear layers with their activation, by oneDNN."""

import pytest
import torch
import torch.nn.functional as F
from operators import before_torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmsoft.models.layers import Mlp, TanhGELU
from mmsoft.ops.linear import fused_dtype, fused_linear

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"),
    # what torch says of its own settings
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
]


# Of this processor; others take bfloat16 as they do without us.
BFLOAT16 = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
needs_bfloat16 = pytest.mark.skipif(BFLOAT16 is None, reason="no bfloat16 of oneDNN")


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if gelu is None else F.gelu(out, approximate=gelu)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", [(63, 16, 48), (1, 7, 1), (2, 50, 64, 33)], ids=str)
def test_float64_is_its_definition(shape, dtype, size, with_bias, gelu):
    """Within the error of torch's own layers in that dtype; tokens in any memory."""
    torch.manual_seed(0)
    *tokens, into, out = shape
    x = (size * torch.randn(*tokens, 2 * into)).to(dtype)[..., ::2]
    weight = (torch.randn(out, into) / into**0.5).to(dtype)
    bias = torch.randn(out).to(dtype) if with_bias else None
    assert fused_dtype(x, weight, bias) == dtype
    ours = fused_linear(x, weight, bias, gelu, dtype=dtype)
    doubles = (x.double(), weight.double(), None if bias is None else bias.double())
    truth = plain(*doubles, gelu)
    assert (ours.dtype, ours.shape) == (dtype, truth.shape)
    error = (ours.double() - truth).norm()
    terms = plain(*(t if t is None else t.abs() for t in doubles), None)
    floor = 2 * torch.finfo(dtype).eps * terms.norm()
    assert error <= max(1.5 * (plain(x, weight, bias, gelu).double() - truth).norm(), floor)


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("value", [1e30, -1e30, 1e38, -1e38, float("nan")])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_large_numbers(gelu, value, width):
    x, weight = torch.tensor([[value], [1.0]]), torch.ones(width, 1)
    expected = plain(x.double(), weight.double(), None, gelu).float()
    torch.testing.assert_close(fused_linear(x, weight, None, gelu), expected, equal_nan=True)


X, WEIGHT, BIAS = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4)
REFUSED = {
    "float64": lambda: (X.double(), WEIGHT.double(), BIAS.double()),
    "float16": lambda: (X.half(), WEIGHT.half(), BIAS.half()),
    "two dtypes": lambda: (X, WEIGHT.bfloat16(), BIAS),
    "no tokens": lambda: (X[:0], WEIGHT, BIAS),
    "transposed weight": lambda: (X, WEIGHT.mT.contiguous().mT, BIAS),
    "another device": lambda: (X, WEIGHT.to("meta"), BIAS),
    "sparse weight": lambda: (X, WEIGHT.to_sparse(), BIAS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert fused_dtype(*REFUSED[name]()) is None


def test_refused_by_settings():
    assert fused_dtype(X, WEIGHT, BIAS) == torch.float32
    with torch.backends.mkldnn.flags(enabled=False):
        assert fused_dtype(X, WEIGHT, BIAS) is None
    if not before_torch("2.3"):
        with torch.autocast("cpu", torch.float16):
            assert fused_dtype(X, WEIGHT, BIAS) is None
    with torch.autocast("cpu", torch.bfloat16):
        many = X.repeat(30, 1)
        assert fused_dtype(many, WEIGHT, BIAS) == BFLOAT16
        assert fused_dtype(many.bfloat16(), WEIGHT, None) == BFLOAT16
        assert fused_dtype(X.double(), WEIGHT, None) is None
    found = []
    torch.func.vmap(lambda x: found.append(fused_dtype(x, WEIGHT, BIAS)) or x)(X)
    assert found == [None]


class Wrapped(Tensor):
    """As quantized weights are: a subclass that computes by itself."""


def test_subclasses_compute_by_themselves():
    assert fused_dtype(X.as_subclass(Wrapped), WEIGHT, BIAS) is None
    assert fused_dtype(X, nn.Parameter(WEIGHT.as_subclass(Wrapped)), BIAS) is None
    assert fused_dtype(X, nn.Parameter(WEIGHT), nn.Parameter(BIAS)) == torch.float32


def calls(monkeypatch) -> list[str | None]:
    """The activations of the calls that follow."""
    found: list[str | None] = []

    def noted(x, weight, bias, gelu=None, **options):
        found.append(gelu)
        return fused_linear(x, weight, bias, gelu, **options)

    monkeypatch.setattr("mmsoft.models.layers.fused_linear", noted)
    return found


@pytest.mark.parametrize("act", [TanhGELU, nn.GELU])
@pytest.mark.parametrize("autocast", [False, True])
def test_mlp(monkeypatch, act, autocast):
    """The same result and dtype with and without."""
    torch.manual_seed(0)
    mlp, x = Mlp(16, act(), 0.5, 40).eval(), torch.randn(2, 80, 16)
    found = calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            ours = mlp(x)
        calls_of_one = [act().approximate, None] if BFLOAT16 or not autocast else []
        assert found == calls_of_one
        expected = mlp(x)
    assert found == calls_of_one
    tolerance = dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, expected.detach(), **tolerance)


OTHER_MLPS = {
    "hooked layer": lambda mlp: mlp[3].register_forward_hook(lambda *args: None),
    "other activation": lambda mlp: mlp.__setitem__(1, nn.ReLU()),
    "spectral norm": lambda mlp: nn.utils.parametrizations.spectral_norm(mlp[0]),
    "one layer more": lambda mlp: mlp.append(nn.Identity()),
}


@pytest.mark.parametrize("name", OTHER_MLPS)
@torch.no_grad()
def test_other_mlps(monkeypatch, name):
    mlp = Mlp(16, TanhGELU(), 0.0)
    OTHER_MLPS[name](mlp)
    found = calls(monkeypatch)
    assert mlp(torch.randn(2, 30, 16)).shape == (2, 30, 16)
    assert not found


@needs_bfloat16
@torch.no_grad()
def test_few_tokens_do_not_cast_weights(monkeypatch):
    mlp, found = Mlp(16, TanhGELU(), 0.0).eval(), calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        mlp(torch.randn(1, 49, 16))
        assert not found
        mlp(torch.randn(4, 49, 16))
    assert len(found) == 2


@torch.no_grad()
def test_flops_are_counted():
    """By torch, which does not know the fused operator."""
    with FlopCounterMode(display=False) as counter:
        Mlp(16, TanhGELU(), 0.0, 40).eval()(torch.randn(2, 30, 16))
    assert counter.get_total_flops() == 2 * 2 * 60 * 16 * 40


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 4])
def test_dropout_asked_for_in_evaluation(monkeypatch, layer):
    """As Monte Carlo dropout does: between the two layers, or after them."""
    mlp, found = Mlp(16, TanhGELU(), 1.0).eval(), calls(monkeypatch)
    mlp[layer].train()
    out = mlp(torch.randn(2, 30, 16))
    expected = mlp[3].bias if layer == 2 else torch.zeros(16)
    torch.testing.assert_close(out, expected.expand(2, 30, 16))
    assert len(found) == 2
