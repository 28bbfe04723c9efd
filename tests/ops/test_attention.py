"""The operator against its float64 definition: forward, all gradients, every dtype and shape."""

import pytest
import torch
from metrics import error
from on_device import device_type
from operators import VARIANTS, before_torch
from torch import Tensor

from mmsoft.ops import softmax_free_attention
from mmsoft.ops.reference import softmax_free_attention as reference

# batch, heads, tokens, landmarks, head dim
SHAPES = [
    (2, 2, 63, 7, 16),
    (1, 3, 1000, 49, 32),
    (2, 1, 5, 1, 64),
    (1, 2, 1, 3, 32),
    (1, 1, 1, 1, 32),
    (3, 2, 40, 50, 32),  # more landmarks than tokens
    (1, 1, 4211, 256, 32),
]


def arguments(shape, spread=1.0, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, values, landmarks; a small ``spread`` makes A ill conditioned."""
    batch, heads, n, m, d = shape
    g = torch.Generator().manual_seed(seed)
    scale = spread * d**-0.25
    q = torch.randn(batch, heads, n, d, generator=g, dtype=torch.float64) * scale
    v = torch.randn(batch, heads, n, d, generator=g, dtype=torch.float64)
    landmarks = torch.randn(batch, heads, m, d, generator=g, dtype=torch.float64) * scale
    return q.to(dtype), v.to(dtype), landmarks.to(dtype)


def run(function, tensors, autocast=None, **kwargs) -> list[Tensor]:
    """Output and the three gradients for a fixed random cotangent."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast(device_type(), dtype=autocast, enabled=autocast is not None):
        out = function(*tensors, **kwargs)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_exact(shape, normalize, solver):
    """With and without a scale, which is a factor of the output and of every gradient."""
    tensors = arguments(shape)
    kwargs = dict(normalize=normalize, solver=solver)
    for ours, scaled, truth in zip(
        run(softmax_free_attention, tensors, **kwargs),
        run(softmax_free_attention, tensors, scale=0.3, **kwargs),
        run(reference, tensors, **kwargs),
    ):
        close = dict(rtol=1e-8, atol=1e-9 * float(truth.abs().max()))
        torch.testing.assert_close(ours, truth, **close)
        torch.testing.assert_close(scaled, 0.3 * truth, **close)


@pytest.mark.parametrize("solver", ["direct", pytest.param("newton", marks=pytest.mark.long)])
def test_as_many_landmarks_as_the_release_has_for_detection(solver):
    """m = 1050: the strided grid of an 800x1344 image."""
    tensors = arguments((1, 1, 1300, 1050, 32))
    for ours, truth in zip(
        run(softmax_free_attention, tensors, solver=solver), run(reference, tensors, solver=solver)
    ):
        assert error(ours, truth) < 1e-7


# landmarks: 1 to 257, at powers of 2, beside them, and the usual 49
LOW_PRECISION_SHAPES = [
    (2, 1, 5, 1, 64),
    (8, 2, 30, 2, 32),
    *SHAPES[:2],
    (3, 2, 40, 50, 32),  # more landmarks than tokens
    (1, 2, 150, 64, 32),
    (1, 1, 200, 100, 32),
    (1, 1, 300, 128, 32),
    (1, 1, 300, 257, 32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("shape", LOW_PRECISION_SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, pytest.param(0.3, marks=pytest.mark.long), 0.03])
def test_low_precision_loses_no_more_than_plain_torch(shape, normalize, solver, spread, dtype):
    """Error at most 2 times (forward), 3 times (backward) that of plain PyTorch in float32.

    And never above 2 %, which plain PyTorch exceeds where landmarks nearly coincide.
    """
    tensors = arguments(shape, spread, dtype)
    kwargs = dict(normalize=normalize, solver=solver)
    truth = run(reference, [t.double() for t in tensors], **kwargs)
    plain = run(reference, [t.float() for t in tensors], **kwargs)
    ours = run(softmax_free_attention, tensors, **kwargs)
    floor = 8 * torch.finfo(torch.float32).eps  # of kernel values, whose exponents reach -13
    for name, factor, mine, theirs, exact in zip(
        ("out", "q", "v", "landmarks"), (2, 3, 3, 3), ours, plain, truth
    ):
        assert mine.dtype == dtype
        allowed = min(max(factor * error(theirs, exact), floor), 0.02)
        rounding = 5 * error(exact.to(dtype), exact)  # of terms that may cancel, and of their sum
        assert error(mine, exact) <= allowed + rounding, name


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("spread", [1.0, 0.03])
def test_without_gradients_a_small_kernel_is_computed_once(normalize, solver, spread, dtype):
    """The same output in the same memory, with no more error, whichever way it is computed."""
    tensors = arguments((2, 2, 300, 30, 32), spread, dtype)
    kwargs = dict(normalize=normalize, solver=solver)
    truth = reference(*(t.double() for t in tensors), **kwargs)
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            out = softmax_free_attention(*tensors, **kwargs)
        operators = {event.key for event in profile.key_averages()}
        assert "aten::exp_" in operators
        assert "mmsoft::gaussian_kernel_product" not in operators
        assert softmax_free_attention(*(t[:0] for t in tensors), **kwargs).shape[0] == 0
    streamed = softmax_free_attention(*(t.requires_grad_() for t in tensors), **kwargs).detach()
    assert out.dtype == streamed.dtype
    assert out.stride() == streamed.stride()
    floor = 4 * torch.finfo(dtype).eps
    assert error(out, truth) <= max(2 * error(streamed, truth), floor)


HALF = pytest.param(
    torch.float16,
    marks=pytest.mark.skipif(before_torch("2.3"), reason="CPU autocast knows bfloat16 alone"),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
def test_autocast_leaves_the_arithmetic_in_float32(dtype):
    q, v, landmarks = arguments((2, 2, 300, 30, 32), 0.5, torch.float32)
    outside = run(softmax_free_attention, (q, v, landmarks))
    inside = run(softmax_free_attention, (q, v, landmarks), autocast=dtype)
    for a, b in zip(outside, inside):
        assert torch.equal(a, b)
    half = softmax_free_attention(q.to(dtype), v.to(dtype), landmarks)  # float32 landmarks
    assert half.dtype == dtype


# How an argument may lie in memory: functions of a leaf, the result of which has the shape of it.
LAYOUTS = {
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels outside": lambda t: t.mT.contiguous().mT,
    "every other element": lambda t: torch.stack((t, -t), -1)[..., 0],
    "slice of a longer one": lambda t: torch.cat((t, -t), 2)[:, :, : t.shape[2]],
    "one for all": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_strided_and_expanded_arguments(solver, layout):
    """Outputs and gradients are those of contiguous arguments; the cotangent is strided as well."""
    lay = LAYOUTS[layout]
    leaves = arguments((2, 3, 70, 9, 32))
    results = []
    for change in (lay, lambda t: lay(t).clone(memory_format=torch.contiguous_format)):
        tensors = [t.clone().requires_grad_() for t in leaves]
        laid = [change(t) for t in tensors]
        assert all(t.is_contiguous() for t in laid) == (change is not lay)
        out = softmax_free_attention(*laid, solver=solver)
        gradients = torch.autograd.grad(out, tensors, change(torch.ones_like(out) + leaves[0]))
        results.append([out, *gradients])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected)


def test_output_memory_merges_heads_without_a_copy():
    out = softmax_free_attention(*arguments((2, 3, 70, 9, 32)))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_empty_batch(normalize, solver):
    tensors = arguments((0, 2, 30, 5, 32), dtype=torch.float32)
    out, *grads = run(softmax_free_attention, tensors, normalize=normalize, solver=solver)
    assert out.shape == (0, 2, 30, 32)
    assert all(g.shape == t.shape for g, t in zip(grads, tensors))


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_batch_mates_do_not_matter(normalize, solver):
    q, v, landmarks = arguments((8, 2, 200, 20, 32), dtype=torch.float32)
    extreme = [t.clone() for t in (q, v, landmarks)]
    for t, factor in zip(extreme, (1e3, 1e4, 1e-4)):
        t[1:] *= factor
    kwargs = dict(normalize=normalize, solver=solver)
    alone = softmax_free_attention(q[:1], v[:1], landmarks[:1], **kwargs)
    for batch in ((q, v, landmarks), extreme):
        together = softmax_free_attention(*batch, **kwargs)[:1]
        assert error(together, alone.double()) < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_double_backward_is_refused_clearly(normalize):
    tensors = [t.requires_grad_() for t in arguments((1, 1, 20, 4, 16))]
    out = softmax_free_attention(*tensors, normalize=normalize)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.softmax_free_attention"):
        grad.sum().backward()


BAD = [
    (dict(q=[[1.0]]), TypeError, "q must be a tensor"),
    (dict(q=(4, 10, 32)), ValueError, "q must have 4 dimensions"),
    (dict(v=(1, 2, 9, 32)), ValueError, "v must have the 10 tokens of q, got 9"),
    (dict(landmarks=(1, 2, 4, 16)), ValueError, "head dimension of q, 32, got 16"),
    (dict(landmarks=(1, 3, 4, 32)), ValueError, r"batch and heads of q, \(1, 2\), got \(1, 3\)"),
    (dict(landmarks=(1, 2, 0, 32)), ValueError, "at least one token"),
    (dict(v=torch.float64), TypeError, "v must have the dtype of q"),
    (dict(q=torch.int64), TypeError, "q must be a floating-point tensor"),
    (dict(landmarks=torch.float16), TypeError, "landmarks must be torch.float32"),
    (dict(v=torch.zeros(1, 2, 10, 32, device="meta")), ValueError, "v must be on the device of q"),
    (dict(solver="exact"), ValueError, "solver must be one of"),
    (dict(steps=0), ValueError, "steps must be a positive integer"),
    (dict(steps=2.0), ValueError, "steps must be a positive integer"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_input(change, kind, message):
    shapes = dict(q=(1, 2, 10, 32), v=(1, 2, 10, 32), landmarks=(1, 2, 4, 32))
    call = shapes | change
    for name, value in call.items():
        if isinstance(value, tuple):
            call[name] = torch.zeros(value)
        elif isinstance(value, torch.dtype):
            call[name] = torch.zeros(shapes[name], dtype=value)
    with pytest.raises(kind, match=message):
        softmax_free_attention(call.pop("q"), call.pop("v"), call.pop("landmarks"), **call)
