"""Linear layers with their activation, by oneDNN."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmsoft.models.layers import Mlp, TanhGELU
from mmsoft.ops.linear import fused_dtype, fused_linear


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if gelu is None else F.gelu(out, approximate=gelu)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, float("nan")])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_large_numbers(gelu, value):
    """Also where torch's own exact GELU overflows."""
    x, weight = torch.tensor([[value], [1.0]]), torch.ones(1, 1)
    expected = plain(x.double(), weight.double(), None, gelu).float()
    torch.testing.assert_close(fused_linear(x, weight, None, gelu), expected, equal_nan=True)


# What torch says of its own settings.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

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
    with torch.autocast("cpu", torch.float16):
        assert fused_dtype(X, WEIGHT, BIAS) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_dtype(X, WEIGHT, BIAS) == torch.bfloat16
        assert fused_dtype(X.bfloat16(), WEIGHT, None) == torch.bfloat16
        assert fused_dtype(X.double(), WEIGHT, None) is None
    found = []
    torch.func.vmap(lambda x: found.append(fused_dtype(x, WEIGHT, BIAS)) or x)(X)
    assert found == [None]


def evaluate(module: nn.Module, x: Tensor, fused: bool) -> tuple[Tensor, int]:
    """The result, and how many multiply-adds torch counts, twice."""
    onednn = torch.backends.mkldnn.flags(enabled=fused)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), onednn:
        out = module(x)
    return out, counter.get_total_flops()


@pytest.mark.parametrize("act", [TanhGELU, nn.GELU])
@pytest.mark.parametrize("autocast", [False, True])
def test_mlp(act, autocast):
    """The same result, dtype, and FLOPs with and without."""
    torch.manual_seed(0)
    mlp, x = Mlp(16, act(), 0.5, 40).eval(), torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (ours, flops), (expected, expected_flops) = (evaluate(mlp, x, f) for f in (True, False))
    assert flops == expected_flops == 2 * 2 * 60 * 16 * 40
    tolerance = dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, expected, **tolerance)


def test_dropout_asked_for_in_evaluation():
    """As Monte Carlo dropout does: between the two layers and after them."""
    mlp = Mlp(16, TanhGELU(), 0.5).eval()
    for module in mlp.modules():
        module.train(isinstance(module, nn.Dropout))
    x = torch.randn(2, 30, 16)
    with torch.no_grad():
        assert (mlp(x) == 0).any()
        assert not torch.equal(mlp[2](torch.ones(100)), torch.ones(100))
