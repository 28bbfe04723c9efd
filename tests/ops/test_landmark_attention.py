"""Attention through landmarks against its float64 definition, and what it promises."""

import pytest
import torch
import torch.nn.functional as F
from metrics import error
from on_device import device_type
from operators import FLOAT16, Calls, before_torch
from torch import Tensor

from mmsoft.ops import choose_landmarks, landmark_attention, reference, softmax
from mmsoft.ops.softmax import landmark_means, read_landmarks

# batch, heads, tokens, landmarks, head dim
SHAPES = [(2, 3, 63, 9, 16), (1, 2, 1000, 49, 32), (2, 1, 1, 1, 64), (1, 2, 40, 50, 32)]
HALF = (torch.bfloat16, FLOAT16)
# Before, on a CPU, none of it takes a mask: softmax and products apart, each rounded.
FUSED = not before_torch("2.6")


def arguments(shape=SHAPES[0], spread=1.0, dtype=torch.float64) -> list[Tensor]:
    """Queries and values in the memory that layers hand over, landmarks, and which there are."""
    batch, heads, n, m, d = shape
    g = torch.Generator().manual_seed(0)
    q, v, landmarks = (
        torch.randn(batch, k, heads, d, generator=g, dtype=torch.float64).transpose(1, 2)
        for k in (n, n, m)
    )
    present = torch.rand(batch, heads, m, generator=g) > 0.4
    present[..., 0] = True
    return [*(t.to(dtype) for t in (spread * q, v, spread * landmarks)), present]


def run(function, tensors, present, autocast=None) -> list[Tensor]:
    """Output and the three gradients for a fixed random cotangent."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast(device_type(), dtype=autocast, enabled=autocast is not None):
        out = function(*tensors, present)
    weight = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_exact(shape, spread, everywhere):
    *tensors, present = arguments(shape, spread)
    present = None if everywhere else present
    for ours, truth in zip(
        run(landmark_attention, tensors, present),
        run(reference.landmark_attention, tensors, present),
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spread", [0.05, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] > 1], ids=str)
def test_low_precision(shape, dtype, spread):
    """Within the definition's own error in that dtype. (Of one token, gradients are rounding.)"""
    *tensors, present = arguments(shape, spread, dtype)
    definition = reference.landmark_attention
    double = run(definition, [t.double() for t in tensors], present)
    plain = run(definition, tensors, present)
    floor = 4 * torch.finfo(dtype).eps
    for ours, single, truth in zip(run(landmark_attention, tensors, present), plain, double):
        assert ours.dtype == dtype
        ours, plain = ((t.double() - truth).norm() for t in (ours, single))
        assert ours <= max(2 * plain, floor * max(truth.norm(), double[0].norm()))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    """As in that dtype: no overflow of products that float16 cannot hold, sums not in it.

    Of queries whose mean is 0, because what is left of others is rounded once more.
    """
    *tensors, present = arguments((1, 2, 4000, 49, 32), 12.0, torch.float32)
    half = tensors[0][:, :, :2000].to(dtype).float()
    tensors[0] = torch.cat((half, -half), 2)
    ours = run(landmark_attention, tensors, present, autocast=dtype)
    truth = run(reference.landmark_attention, [t.to(dtype).double() for t in tensors], present)
    assert error(ours[0], truth[0]) < (8 if FUSED else 24) * torch.finfo(dtype).eps
    assert all(t.isfinite().all() for t in ours)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [FLOAT16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_where_fused_attention_overflows(dtype, autocast, monkeypatch):
    """On CPUs before torch 2.6: in float32 then, of what float16 leaves of the arguments."""
    *tensors, present = arguments((1, 2, 400, 9, 32), 12.0, torch.float32)
    tensors = [t.to(dtype) for t in tensors]
    given = [t.float() for t in tensors] if autocast else tensors
    autocast = dtype if autocast else None
    monkeypatch.setattr(softmax, "_OVERFLOWS", True)
    with Calls() as calls:
        ours = run(landmark_attention, given, present, autocast)
    assert any("scaled_dot_product" in name for name in calls.names)
    assert ours[0].dtype == dtype
    truth = run(reference.landmark_attention, [t.double() for t in tensors], present)
    assert error(ours[0], truth[0]) < 8 * torch.finfo(dtype).eps
    most = [torch.full_like(t, torch.finfo(dtype).max) for t in given]
    assert all(t.isfinite().all() for t in run(landmark_attention, most, present, autocast)[:1])
    seen = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **_: seen.append(q.dtype) or v
    )
    softmax.softmax_attention(*3 * (tensors[0],))
    assert seen == [torch.float32]


@pytest.mark.parametrize("size", [1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_may_read_by_part(dtype, size):
    """Also where coordinates are beyond those that count."""
    q, v, landmarks, present = arguments(spread=size, dtype=dtype)
    means = landmark_means(q, v, landmarks, present)
    parts = [read_landmarks(part, means) for part in q.split(20, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), landmark_attention(q, v, landmarks, present))
    if size > 1 and dtype != torch.float64:  # rounding decides which landmark is nearest
        return
    alone = read_landmarks(q[1:], means.of(1))
    torch.testing.assert_close(alone, torch.cat(parts, 2)[1:])


@pytest.mark.cpu
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [1.0, 1e35, -1e35, float("inf"), float("nan")])
def test_clamped_where_there_is_a_reason(which, value):
    """A look at the values is faster than a copy of them."""
    *tensors, present = arguments(dtype=torch.float32)
    tensors[which].transpose(1, 2)[0, 3, 1, 2] = value  # none of a landmark that is absent
    with Calls() as calls:
        out = landmark_attention(*tensors, present)
    assert ("hardtanh" in calls.names) is (value != 1.0)
    assert out.isfinite().all() or not abs(value) <= 1e35


def test_any_memory():
    *tensors, present = arguments()
    expected = run(landmark_attention, tensors, present)
    strided = [torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(run(landmark_attention, strided, present), expected):
        torch.testing.assert_close(a, b)
    out = landmark_attention(*tensors, present)
    if FUSED and device_type() == "cpu":  # in float64 a GPU's is not fused
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_absent_landmarks_do_nothing():
    """Whatever their coordinates; and they have no gradient."""
    q, v, landmarks, present = arguments()
    out = run(landmark_attention, (q, v, landmarks), present)
    moved = torch.where(present[..., None], landmarks, 1e30)
    for a, b in zip(run(landmark_attention, (q, v, moved), present), out):
        torch.testing.assert_close(a, b)
    assert not out[3][~present].any()
    assert out[3][present].any()


def test_outputs_are_means_of_values():
    q, v, landmarks, present = arguments(spread=2.0)
    out = landmark_attention(q, torch.ones_like(v), landmarks, present)
    torch.testing.assert_close(out, torch.ones_like(out))
    out = landmark_attention(q, v.abs(), landmarks, present)
    assert (out > 0).all()
    assert (out <= v.abs().amax(2, keepdim=True)).all()


def attend(q: Tensor, v: Tensor) -> Tensor:
    """With landmarks chosen among all tokens."""
    index, present = choose_landmarks(q, 32)
    landmarks = q.gather(2, index[..., None].expand(-1, -1, -1, q.shape[-1]))
    return landmark_attention(q, v, landmarks, present)


def test_the_term_is_that_of_the_content_at_any_size():
    """Of the same content several times over, every token gets what it got from one."""
    q, v, _, _ = arguments((1, 1, 64, 1, 8), 0.7)
    once = attend(q, v)
    for times in (4, 16):
        out = attend(*(t.repeat(1, 1, times, 1) for t in (q, v)))[:, :, :64]
        torch.testing.assert_close(out, once)


@pytest.mark.parametrize(
    ("squared", "least"),
    [(50, (0.99, 0.99)), (16, (0.99, 0.98)), (12, (0.97, 0.68)), (9, (0.7, 0.1))],
)
def test_what_is_rare_counts_among_many_if_it_is_unlike_enough(squared, least):
    """Of one token's value, what it gets back among 3136 and among 67200 (docs/method.md)."""
    for n, share in zip((3136, 67200), least):
        q, v, _, _ = arguments((1, 1, n, 1, 8), 0.05)
        q[0, 0, 5] = (squared / 8) ** 0.5
        v = torch.zeros_like(v)
        v[0, 0, 5] = 1
        assert attend(q, v)[0, 0, 5].min() > share


def test_a_long_key_reaches_tokens_that_do_not_resemble_it():
    """What no Gaussian kernel of distances alone does."""
    q = torch.zeros(1, 1, 64, 4, dtype=torch.float64)
    q[..., 0], q[0, 0, 7, 0] = 1.0, 9.0
    v = torch.zeros_like(q)
    v[0, 0, 7] = 1
    assert attend(q, v).min() > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.parametrize("of", ["q", "v", "landmarks"])
def test_finite_on_any_finite_input(dtype, of):
    *tensors, present = arguments(dtype=dtype)
    which = ["q", "v", "landmarks"].index(of)
    largest = torch.finfo(dtype).max
    signs = torch.where(tensors[which] < 0, -1.0, 1.0).to(dtype)
    signs[0, 0] = 1
    tensors[which] = signs * largest
    for t in run(landmark_attention, tensors, present)[: 1 if of == "v" else 4]:
        assert t.isfinite().all()


def test_under_transforms():
    *tensors, present = arguments((2, 2, 11, 5, 8))
    weight = torch.randn(2, 2, 11, 8, dtype=torch.float64)

    def loss(*args):
        return (landmark_attention(*args, present) * weight).sum()

    truth = [t.clone().requires_grad_() for t in tensors]
    out = (reference.landmark_attention(*truth, present) * weight).sum()
    expected = torch.autograd.grad(out, truth)
    for ours, grad in zip(torch.func.grad(loss, (0, 1, 2))(*tensors), expected):
        torch.testing.assert_close(ours, grad)
    tangents = [torch.randn_like(t) for t in tensors]
    _, tangent = torch.func.jvp(loss, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(tangent, sum((g * t).sum() for g, t in zip(expected, tangents)))
    stacked = [torch.stack((t, 2 * t)) for t in tensors]
    both = torch.func.vmap(lambda *args: landmark_attention(*args, present))(*stacked)
    torch.testing.assert_close(both[0], landmark_attention(*tensors, present))
    torch.testing.assert_close(both[1], landmark_attention(*(2 * t for t in tensors), present))


def test_empty_batch_and_meta():
    *tensors, present = arguments()
    assert landmark_attention(*(t[:0] for t in tensors), present[:0]).shape == (0, 3, 63, 16)
    out = landmark_attention(*(t.to("meta") for t in tensors), present.to("meta"))
    assert (out.shape, out.device.type) == ((2, 3, 63, 16), "meta")


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (torch.ones(2, 3, 8, dtype=torch.bool), r"present must be bool of shape \(2, 3, 9\)"),
        (torch.ones(2, 3, 9), "as landmarks, got torch.float32 of shape"),
    ],
)
def test_invalid_present(present, message):
    with pytest.raises(ValueError, match=message):
        landmark_attention(*arguments()[:3], present)


def test_invalid_tokens():
    q, v, landmarks, _ = arguments()
    with pytest.raises(ValueError, match="v must have the 63 tokens of q, got 62"):
        landmark_attention(q, v[:, :, 1:], landmarks)
