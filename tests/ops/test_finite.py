"""Never NaN on a finite input: property-based."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops import softmax_free_attention

KINDS = ["normal", "constant", "zero", "duplicated", "one-hot", "two clusters"]


def tokens(kind: str, shape: tuple[int, ...], magnitude: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    n, d = shape[-2:]
    if kind == "constant":
        x = x[..., :1, :1].expand(shape)
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "duplicated":
        x = x[..., torch.arange(n) % 2, :]
    elif kind == "one-hot":
        x = torch.eye(d)[torch.arange(n) % d].expand(shape)
    elif kind == "two clusters":
        x = 1e-3 * x + (torch.arange(n) % 2)[:, None]
    return (x * magnitude).clone()


kinds = st.sampled_from(KINDS)
magnitudes = st.floats(-6, 4).map(lambda exponent: 10**exponent)
variants = st.tuples(st.booleans(), st.sampled_from(["newton", "direct"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kinds, kinds, kinds, magnitudes, magnitudes, st.integers(1, 70), st.integers(1, 20), variants,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_operator(kind, v_kind, l_kind, magnitude, v_magnitude, n, m, variant, dtype, seed):
    normalize, solver = variant
    q = tokens(kind, (1, 2, n, 16), magnitude, seed)
    v = tokens(v_kind, (1, 2, n, 16), v_magnitude, seed + 1)
    landmarks = tokens(l_kind, (1, 2, m, 16), magnitude, seed + 2)
    tensors = [t.to(dtype).requires_grad_() for t in (q, v, landmarks)]
    out = softmax_free_attention(*tensors, normalize=normalize, solver=solver)
    assert out.isfinite().all()
    if dtype == torch.float32:  # in half precision a gradient may well exceed the range
        out.mean().backward()
        assert all(not t.grad.isnan().any() for t in tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 20), st.integers(1, 20), kinds, magnitudes, variants,
    st.sampled_from([None, 1, 4]), st.sampled_from([2, 4, 8]),
)  # fmt: skip
def test_layer(height, width, kind, magnitude, variant, budget, stride):
    """Grids smaller than the stride, and no multiples of it, too."""
    torch.manual_seed(0)
    normalize, solver = variant
    layer = SoftmaxFreeAttention(
        32, 2, stride, 3, normalize=normalize, solver=solver, max_landmarks=budget
    )
    x = tokens(kind, (2, height * width, 32), magnitude, 0).requires_grad_()
    out = layer(x, (height, width))
    assert out.isfinite().all()
    out.mean().backward()
    assert all(p.grad is not None and not p.grad.isnan().any() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("solver", ["newton", "direct"])
@pytest.mark.parametrize("normalize", [True, False])
def test_constant_image_makes_a_all_ones(normalize, solver):
    """Rank 1, the worst conditioning there is: the mean value comes out, not noise."""
    q = torch.full((1, 1, 1024, 32), 0.1)
    v = torch.randn(1, 1, 1024, 32)
    out = softmax_free_attention(q, v, q[:, :, :256], normalize=normalize, solver=solver)
    spread = out - out.mean(2, keepdim=True)
    assert spread.norm() < 1e-3 * out.norm()
