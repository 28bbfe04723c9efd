"""Landmarks by content: the choice, their patches, their means, and the operator with counts."""

import pytest
import torch
from metrics import error
from torch.library import opcheck

from mmsoft.ops import (
    choose_landmarks,
    landmark_patches,
    reference,
    salient_mean,
    softmax_free_attention,
)

# vmap says so of every operation that it has no rule for.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
VARIANTS = [(n, s) for n in ("mean", True, False) for s in ("newton", "direct")]


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


# candidates, budget, tolerance
CHOICES = [
    ((2, 3, 40, 8), 12, 0.03),
    ((1, 2, 63, 16), 49, 0.0),
    ((2, 1, 1000, 32), 16, 0.03),
    ((1, 2, 5, 8), 12, 0.03),  # fewer than the budget
    ((3, 1, 1, 4), 3, 0.03),
    ((1, 1, 30, 4), 1, 0.0),
    ((0, 2, 6, 4), 3, 0.03),
]


@pytest.mark.parametrize(("shape", "budget", "tolerance"), CHOICES, ids=str)
def test_the_choice_is_that_of_the_definition(shape, budget, tolerance):
    candidates = normal(*shape, scale=0.4)
    index, counts = choose_landmarks(candidates, budget, tolerance=tolerance)
    expected, truth = reference.choose_landmarks(candidates, budget, tolerance=tolerance)
    assert torch.equal(index, expected)
    torch.testing.assert_close(counts, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_choice_in_low_precision(dtype):
    """That of the same, rounded candidates in float64."""
    candidates = normal(2, 2, 200, 16, scale=0.5, dtype=dtype)
    index, counts = choose_landmarks(candidates, 30)
    expected, truth = reference.choose_landmarks(candidates.double(), 30)
    assert counts.dtype == torch.float32
    assert torch.equal(index, expected)
    assert error(counts, truth) < 1e-5


def test_clusters_have_one_landmark_each_which_counts_them():
    places = 4 * torch.eye(3, 8, dtype=torch.float64)
    candidates = places.repeat_interleave(torch.tensor([50, 7, 1]), 0)[None, None]
    index, counts = choose_landmarks(candidates, 16)
    assert sorted(index[0, 0, :3].tolist()) == [0, 50, 57]
    torch.testing.assert_close(
        counts.sort().values[0, 0, -3:].double(), torch.tensor([1.0, 7, 50]).double()
    )
    assert not counts[0, 0, 3:].any()


def test_equal_candidates_are_one_landmark():
    index, counts = choose_landmarks(torch.full((2, 2, 9, 4), 1.5), 5, tolerance=0.0)
    assert not index.any()
    assert torch.equal(counts, torch.tensor([9.0, 0, 0, 0, 0]).expand(2, 2, 5))


def test_what_is_chosen_explains_more_than_an_even_grid():
    """A rare cluster among many candidates: the even choice of as many misses it."""
    candidates = normal(1, 1, 1000, 8, scale=0.1)
    candidates[0, 0, 437] += 3
    index, _ = choose_landmarks(candidates, 4)
    assert 437 in index[0, 0, :2]


def test_samples_and_heads_are_chosen_alone():
    candidates = normal(3, 2, 60, 8, scale=0.4)
    index, counts = choose_landmarks(candidates, 20)
    for b in range(3):
        for h in range(2):
            one = choose_landmarks(candidates[b : b + 1, h : h + 1], 20)
            assert torch.equal(one[0][0, 0], index[b, h])
            torch.testing.assert_close(one[1][0, 0], counts[b, h], rtol=1e-12, atol=0)


def test_candidates_may_be_strided():
    strided = normal(2, 60, 3, 8, scale=0.4).transpose(1, 2)
    for ours, truth in zip(choose_landmarks(strided, 9), choose_landmarks(strided.clone(), 9)):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6, 1e38])
def test_any_finite_candidates(size):
    candidates = size * normal(1, 2, 40, 8, dtype=torch.float32).clamp(-3, 3)
    index, counts = choose_landmarks(candidates, 9)
    assert ((index >= 0) & (index < 40)).all()
    assert counts.isfinite().all()
    assert (counts[..., 0] >= 1).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("no", 3), {}, "candidates must be a floating-point tensor"),
        ((torch.zeros(1, 1, 4, 2, dtype=torch.long), 3), {}, "candidates must be a floating-point"),
        ((torch.zeros(1, 4, 2), 3), {}, r"must be \[B, heads, M, d\], .* got shape \(1, 4, 2\)"),
        ((torch.zeros(1, 1, 0, 2), 3), {}, r"got shape \(1, 1, 0, 2\)"),
        ((torch.zeros(1, 1, 4, 2), 0), {}, "budget must be a positive integer, got 0"),
        ((torch.zeros(1, 1, 4, 2), 3), dict(tolerance=1), r"tolerance must be in \[0, 1\), got 1"),
    ],
)
def test_invalid_choices(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        choose_landmarks(*arguments, **options)


def test_choice_is_an_operator():
    opcheck(torch.ops.mmsoft.landmark_choice, (normal(2, 2, 20, 4), 6, 0.03))


def test_choice_under_transforms():
    candidates = normal(3, 2, 2, 20, 4, scale=0.5)
    index, counts = torch.func.vmap(lambda c: choose_landmarks(c, 6))(candidates)
    for i, each in enumerate(candidates):
        expected = choose_landmarks(each, 6)
        assert torch.equal(index[i], expected[0])
        torch.testing.assert_close(counts[i], expected[1])


@pytest.mark.parametrize(("hw", "stride"), [((6, 9), 2), ((17, 19), 4), ((3, 5), 8)], ids=str)
def test_patches_by_index(hw, stride):
    """Those of all patches with the same numbers, and the same gradient, where one occurs twice."""
    q = normal(2, hw[0] * hw[1], 6).requires_grad_()
    every = landmark_patches(q, hw, 2, stride)
    index = torch.randint(every.shape[1], (2, 2, 5))
    ours = landmark_patches(q, hw, 2, stride, index=index)
    where = index[..., None, None].expand(-1, -1, -1, *every.shape[3:])
    truth = every.transpose(1, 2).gather(2, where).transpose(1, 2)
    assert torch.equal(ours, truth)
    assert ours.is_contiguous()
    weight = torch.randn_like(ours)
    grads = (torch.autograd.grad(out, q, weight, retain_graph=True)[0] for out in (ours, truth))
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradgradcheck(
        lambda t: landmark_patches(t, hw, 2, stride, index=index), (q,)
    )
    opcheck(torch.ops.mmsoft.landmark_patches, (q, *hw, 2, stride, None, index))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(1, 2, 3), r"index must be \[B, heads, m\] of int64, .* torch.float32"),
        (torch.zeros(1, 3, dtype=torch.long), r"got shape \(1, 3\)"),
        (torch.zeros(1, 3, 3, dtype=torch.long), r"heads of q, \(1, 2\), got \(1, 3\)"),
    ],
)
def test_invalid_index(index, message):
    with pytest.raises(ValueError, match=message):
        landmark_patches(torch.zeros(1, 16, 4), (4, 4), 2, 2, index=index)


def test_salient_mean():
    patches = normal(2, 5, 3, 16, 8).requires_grad_()
    centre = patches.detach().mean((1, 3))
    outs = salient_mean(patches, centre), reference.salient_mean(patches, centre)
    torch.testing.assert_close(*outs)
    weight = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, patches, weight)[0] for out in outs))


def test_salient_mean_leaves_padding_out():
    patches, valid = normal(2, 5, 3, 16, 8), torch.arange(16) % 3 == 0
    centre = patches.mean((1, 3))
    expected = reference.salient_mean(patches[..., valid, :], centre)
    torch.testing.assert_close(salient_mean(patches, centre, valid), expected)
    torch.testing.assert_close(reference.salient_mean(patches, centre, valid), expected)


def test_salient_mean_is_the_token_unlike_the_image():
    patches = torch.zeros(1, 4, 1, 16, 8)
    patches[0, 2, 0, 5] = 1
    mean = salient_mean(patches, torch.zeros(1, 1, 8))
    torch.testing.assert_close(mean[0, 2, 0], torch.ones(8))
    assert not mean[0, [0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1.0, 6e4])
def test_salient_mean_in_low_precision(dtype, size):
    patches = normal(2, 5, 3, 16, 8, scale=size).clamp(-6e4, 6e4).to(dtype)
    centre = patches.float().mean((1, 3))
    mean = salient_mean(patches, centre)
    assert mean.dtype == torch.float32
    assert error(mean, reference.salient_mean(patches.double(), centre.double())) < 1e-5
    assert salient_mean(patches.float() * 1e30, centre * 1e30).isfinite().all()


def arguments(n=63, m=9, dtype=torch.float64, spread=0.5):
    """With landmarks that are absent; one head has a single one."""
    q, v, landmarks = (normal(2, 3, k, 8, seed=k) for k in (n, n + 1, m))
    counts = 5 * torch.rand(2, 3, m, generator=torch.Generator().manual_seed(1)).double() + 1
    counts[0, 1, 4:] = 0
    counts[1, 2, 0] = 0
    counts[1, 0, :-1] = 0
    return *((spread * t).to(dtype) for t in (q, v[:, :, 1:], landmarks)), counts


def run(function, tensors, counts, **kwargs):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors, counts, **kwargs)
    out.backward(normal(*out.shape, seed=7).to(out.dtype))
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize(("n", "m"), [(63, 9), (1, 9), (1000, 49)])
def test_counts_in_float64(n, m, normalize, solver):
    *tensors, counts = arguments(n, m)
    options = dict(normalize=normalize, solver=solver, scale=0.3)
    for ours, truth in zip(
        run(softmax_free_attention, tensors, counts, **options),
        run(reference.softmax_free_attention, tensors, counts, **options),
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9 * float(truth.abs().max()))


@pytest.mark.parametrize("spread", [0.5, 0.05])
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_counts_in_float32(normalize, solver, spread):
    """Within the definition's own error in float32, or 1e-5."""
    *tensors, counts = arguments(dtype=torch.float32, spread=spread)
    options = dict(normalize=normalize, solver=solver)
    definition = reference.softmax_free_attention
    double = run(definition, [t.double() for t in tensors], counts, **options)
    single = run(definition, tensors, counts.float(), **options)
    ours = run(softmax_free_attention, tensors, counts, **options)
    for mine, plain, truth in zip(ours, single, double):
        assert error(mine, truth) <= max(4 * error(plain, truth), 1e-5)


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("grad", [True, False])
def test_absent_landmarks_do_nothing(normalize, solver, grad):
    """Whatever their coordinates, the same bits; and they have no gradient."""
    *tensors, counts = arguments(dtype=torch.float32)
    absent = counts == 0
    options = dict(normalize=normalize, solver=solver)
    with torch.set_grad_enabled(grad):
        out = softmax_free_attention(*tensors, counts, **options)
        moved = tensors[2].masked_fill(absent[..., None], 0.1)
        torch.testing.assert_close(
            softmax_free_attention(*tensors[:2], moved, counts, **options), out
        )
    grads = run(softmax_free_attention, tensors, counts, **options)[3]
    assert not grads[absent].any()
    assert grads[~absent].any()


def test_counts_in_place_of_d_are_the_release():
    """Row sums of the Gram matrix as counts are the diagonal of D."""
    q, v, landmarks, _ = arguments()
    counts = reference.gaussian_kernel(landmarks, landmarks).sum(-1)
    torch.testing.assert_close(
        softmax_free_attention(q, v, landmarks, counts), softmax_free_attention(q, v, landmarks)
    )


def test_the_term_does_not_grow_with_the_image():
    """Of the same content several times over, every token gets what it got from one."""
    q, v = normal(1, 1, 64, 8, scale=0.7), normal(1, 1, 64, 8)
    outs = []
    for times in (1, 4, 16):
        tokens, values = (t.repeat(1, 1, times, 1) for t in (q, v))
        index, counts = choose_landmarks(tokens, 32)
        landmarks = tokens.gather(2, index[..., None].expand(-1, -1, -1, 8))
        options = dict(normalize="mean", solver="direct")
        outs.append(softmax_free_attention(tokens, values, landmarks, counts, **options)[:, :, :64])
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])


def test_what_is_rare_counts_as_much_among_many():
    """One token unlike all others: its own value reaches it undiluted, in an image of any size."""
    for n in (64, 1024, 16384):
        q = normal(1, 1, n, 8, scale=0.05)
        q[0, 0, 5] += 2
        v = torch.zeros_like(q)
        v[0, 0, 5] = 1
        index, counts = choose_landmarks(q, 16)
        landmarks = q.gather(2, index[..., None].expand(-1, -1, -1, 8))
        options = dict(normalize="mean", solver="direct")
        out = softmax_free_attention(q, v, landmarks, counts, **options)
        torch.testing.assert_close(out[0, 0, 5], v[0, 0, 5], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("counts", "normalize", "message"),
    [
        (None, "mean", "normalize='mean' needs counts"),
        (torch.ones(2, 3, 8), "mean", r"counts must be floating-point of shape \(2, 3, 9\)"),
        (torch.ones(2, 3, 9, dtype=torch.long), True, "got torch.int64"),
        (None, "sum", "normalize must be True, False or 'mean', got 'sum'"),
    ],
)
def test_invalid_counts(counts, normalize, message):
    with pytest.raises(ValueError, match=message):
        softmax_free_attention(*arguments()[:3], counts, normalize=normalize)


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_counts_under_transforms(normalize, solver):
    *tensors, counts = arguments(11, 5)
    options = dict(normalize=normalize, solver=solver)
    weight = normal(2, 3, 11, 8, seed=9)

    def loss(*args):
        return (softmax_free_attention(*args, counts, **options) * weight).sum()

    truth = [t.clone().requires_grad_() for t in tensors]
    out = reference.softmax_free_attention(*truth, counts, **options)
    expected = torch.autograd.grad((out * weight).sum(), truth)
    for ours, grad in zip(torch.func.grad(loss, (0, 1, 2))(*tensors), expected):
        torch.testing.assert_close(ours, grad)
    tangents = [torch.randn_like(t) for t in tensors]
    _, tangent = torch.func.jvp(loss, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(tangent, sum((g * t).sum() for g, t in zip(expected, tangents)))
