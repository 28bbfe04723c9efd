"""Never NaN on a finite input, and finite wherever the result is: up to the limits of the dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import VARIANTS

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops import gaussian_kernel, gaussian_kernel_product, softmax_free_attention
from mmsoft.ops.reference import softmax_free_attention as reference

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


def powers_of_ten(low: int, high: int):
    return st.floats(low, high).map(lambda exponent: 10**exponent)


kinds = st.sampled_from(KINDS)
variants = st.sampled_from(VARIANTS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kinds, kinds, kinds, powers_of_ten(-38, 38), powers_of_ten(-6, 2), powers_of_ten(-38, 30),
    st.integers(1, 70), st.integers(1, 20), variants, st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_operator_is_finite(
    kind, v_kind, l_kind, magnitude, usual, v_magnitude, n, m, variant, is_usual, dtype, seed
):
    """Queries, landmarks and values of any magnitude; no result here is out of float32's range."""
    normalize, solver = variant
    if is_usual:
        magnitude = usual
    limits = torch.finfo(dtype)
    tensors = [
        tokens(k, (1, 2, count, 16), size, seed + i).clamp(limits.min, limits.max).to(dtype)
        for i, (k, count, size) in enumerate(
            ((kind, n, magnitude), (v_kind, n, v_magnitude), (l_kind, m, magnitude))
        )
    ]
    out = softmax_free_attention(
        *(t.requires_grad_() for t in tensors), normalize=normalize, solver=solver
    )
    assert out.isfinite().all()
    with torch.no_grad():
        without = softmax_free_attention(*tensors, normalize=normalize, solver=solver)
        assert without.isfinite().all()
    if dtype == torch.float32:  # in half precision a gradient may well exceed the range
        (out.mean() / max(1, magnitude)).backward()
        assert all(t.grad.isfinite().all() for t in tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 20), st.integers(1, 20), kinds, powers_of_ten(-6, 4), variants,
    st.sampled_from([None, 1, 4]), st.sampled_from([2, 4, 8]),
)  # fmt: skip
def test_layer_is_finite(height, width, kind, magnitude, variant, budget, stride):
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


# tokens, landmarks, spread: sums of 2000 values, landmarks that nearly coincide, far apart
EXTREME_SHAPES = [(2000, 7, 0.1), (100, 100, 0.03), (300, 20, 0.5), (7, 49, 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
def test_values_at_the_limits(shape, normalize, solver, dtype):
    """Values times a power of 2 give the result times it, to the last bit, up to the largest.

    So do the gradients of queries and landmarks, and that of the values stays the same. The result
    at moderate values is compared with the definition in test_attention.py.
    """
    n, m, spread = shape
    tensors = [
        (size * torch.randn(2, 2, k, 16)).to(dtype)
        for k, size in ((n, spread), (n, 1.0), (m, spread))
    ]
    kwargs = dict(normalize=normalize, solver=solver, scale=2.0**-10)

    def results(exponent, cotangent):
        v = (tensors[1].double() * 2.0**exponent).to(dtype)  # ldexp of torch 2.1 overflows
        leaves = [t.clone().requires_grad_() for t in (tensors[0], v, tensors[2])]
        out = softmax_free_attention(*leaves, **kwargs)
        with torch.no_grad():
            without = softmax_free_attention(*leaves, **kwargs)
        return [out.detach(), without, *torch.autograd.grad(out, leaves, cotangent)]

    def largest(t):
        return float(t.abs().max())

    cotangent = torch.randn(2, 2, n, 16).to(dtype)
    usual = results(0, cotangent)
    # So small a cotangent that no gradient is larger than the output.
    excess = max(largest(g) for g in usual[2:]) / largest(usual[0])
    cotangent = cotangent * 2.0 ** -max(0, math.ceil(math.log2(excess)))
    usual = results(0, cotangent)
    room = torch.finfo(dtype).max / max(largest(usual[0]), largest(tensors[1]))
    for exponent in (math.floor(math.log2(room)), -60):
        factor = torch.tensor(2.0, dtype=torch.float64) ** exponent
        for name, a, b in zip(
            ("out", "without", "q", "v", "landmarks"), results(exponent, cotangent), usual
        ):
            assert a.isfinite().all(), name
            assert torch.equal(a, (b if name == "v" else b.double() * factor).to(dtype)), name


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_float16_saturates(normalize, solver):
    """Where the exact result exceeds 65504, and nowhere else."""
    n, m, spread = EXTREME_SHAPES[0]
    q, v, landmarks = (torch.randn(1, 2, k, 16) for k in (n, n, m))
    q, v, landmarks = (
        (x * size).half() for x, size in ((q, spread), (v, 1e4), (landmarks, spread))
    )
    kwargs = dict(normalize=normalize, solver=solver)
    out = softmax_free_attention(q, v, landmarks, **kwargs).double()
    truth = reference(q.double(), v.double(), landmarks.double(), **kwargs)
    assert 0.01 < (truth.abs() > 65504).double().mean() < 0.99
    torch.testing.assert_close(out, truth.clamp(-65504, 65504), rtol=1e-3, atol=8)


@pytest.mark.parametrize("magnitude", [1e4, 1e9, 1e20, 3e38])
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_what_is_far_from_everything_else(normalize, solver, magnitude):
    """Far tokens get 0 and give nothing, far landmarks change nothing: no digit of the rest.

    But for a landmark's own row sum, which is 1.
    """
    q, v, landmarks = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 6, 8)
    kwargs = dict(normalize=normalize, solver=solver)
    expected = softmax_free_attention(q, v, landmarks, **kwargs)
    far_q = torch.cat((q, torch.full((1, 2, 3, 8), magnitude)), 2).requires_grad_()
    far_v = torch.cat((v, torch.full((1, 2, 3, 8), 1e30)), 2).requires_grad_()
    far = torch.cat((landmarks, torch.full((1, 2, 1, 8), -magnitude)), 2).requires_grad_()
    out = softmax_free_attention(far_q, far_v, far, **kwargs)
    torch.testing.assert_close(out[:, :, :40], expected, rtol=1e-4, atol=1e-5)
    assert not out[:, :, 40:].any()
    gradients = torch.autograd.grad(out, (far_q, far_v, far), torch.randn_like(out))
    assert all(g.isfinite().all() and g.any() for g in gradients)
    assert not any(g[:, :, n:].any() for g, n in zip(gradients, (40, 40, 6)))


def test_an_outlier_leaves_the_others_their_digits():
    """One point far out must not become the origin of all."""
    x, y = torch.randn(1, 1, 50, 16), torch.randn(1, 1, 30, 16)
    y[..., 7, :] = 1e6
    exact = gaussian_kernel(x.double(), y.double())
    assert (exact > 1e-3).any()
    for kernel in (
        gaussian_kernel(x, y),
        gaussian_kernel_product(x, y, torch.eye(30).expand(1, 1, 30, 30)),
        gaussian_kernel_product(y, x, torch.eye(50).expand(1, 1, 50, 50)).mT,
    ):
        torch.testing.assert_close(kernel.double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("solver", ["newton", "direct"])
@pytest.mark.parametrize("normalize", [True, False])
def test_constant_image_makes_a_all_ones(normalize, solver):
    """Rank 1, the worst conditioning there is: the mean value comes out, not noise."""
    q = torch.full((1, 1, 1024, 32), 0.1)
    v = torch.randn(1, 1, 1024, 32)
    out = softmax_free_attention(q, v, q[:, :, :256], normalize=normalize, solver=solver)
    spread = out - out.mean(2, keepdim=True)
    assert spread.norm() < 1e-3 * out.norm()
