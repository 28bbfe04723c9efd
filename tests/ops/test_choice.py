"""Landmarks by content: the choice, their patches, their means."""

from contextlib import nullcontext

import pytest
import torch
from metrics import error
from operators import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmsoft.ops import (
    choose_landmarks,
    landmark_candidates,
    landmark_patches,
    reference,
    salient_mean,
    use_backend,
)
from mmsoft.ops.landmarks import choice, operators, salient

# vmap says so of every operation that it has no rule for.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=["lapack", "stored", "streamed"])
def any_form(request, monkeypatch):
    """By LAPACK or step by step where candidates are few, and without a Gram matrix."""
    if request.param == "streamed":
        monkeypatch.setattr(choice, "FEW", 0)
    with use_backend("eager", "landmark_choice") if request.param == "stored" else nullcontext():
        yield


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


@pytest.mark.usefixtures("any_form")
@pytest.mark.parametrize(("shape", "budget", "tolerance"), CHOICES, ids=str)
def test_the_choice_is_that_of_the_definition(shape, budget, tolerance):
    candidates = normal(*shape, scale=0.4)
    ours = choose_landmarks(candidates, budget, tolerance=tolerance)
    truth = reference.choose_landmarks(candidates, budget, tolerance=tolerance)
    assert all(map(torch.equal, ours, truth))


@pytest.mark.usefixtures("any_form")
def test_the_first_landmark_does_not_depend_on_the_origin():
    """It is nearest the mean of all, however their norms differ."""
    candidates = normal(20, 2, 60, 8) * normal(20, 2, 60, 1, seed=1).exp()
    candidates[:10] = normal(10, 2, 60, 8, seed=2, scale=0.2) + 2
    candidates[:10, :, 7] = 0
    for shift in (0, 3):
        ours = choose_landmarks(candidates + shift, 8)
        assert all(map(torch.equal, ours, reference.choose_landmarks(candidates + shift, 8)))


@pytest.mark.usefixtures("any_form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_choice_in_low_precision(dtype):
    """That of the same, rounded candidates in float64."""
    candidates = normal(2, 2, 120, 16, scale=0.5, dtype=dtype)
    truth = reference.choose_landmarks(candidates.double(), 30)
    assert all(map(torch.equal, choose_landmarks(candidates, 30), truth))


@pytest.mark.usefixtures("any_form")
def test_clusters_have_one_landmark_each():
    places = 4 * torch.eye(3, 8, dtype=torch.float64)
    candidates = places.repeat_interleave(torch.tensor([50, 7, 1]), 0)[None, None]
    index, present = choose_landmarks(candidates, 16)
    assert sorted(index[0, 0, :3].tolist()) == [0, 50, 57]
    assert present[0, 0].tolist() == [True] * 3 + [False] * 13


@pytest.mark.cpu
def test_lapack_refuses_what_it_is_not_for(monkeypatch):
    pytest.importorskip("scipy")
    candidates = normal(1, 1, choice.FEW + 1, 4)
    with use_backend("lapack"):
        choose_landmarks(candidates[:, :, 1:], 3)
        with pytest.raises(RuntimeError, match="129 candidates, more than 128"):
            choose_landmarks(candidates, 3)
        # As where there is none, or one that was built for another NumPy.
        monkeypatch.setattr(operators, "_LAPACK", "mmsoft.ops.landmarks.absent")
        operators._lacking.cache_clear()
        with pytest.raises(RuntimeError, match="SciPy cannot be imported: No module"):
            choose_landmarks(candidates[:, :, 1:], 3)
    choose_landmarks(candidates[:, :, 1:], 3)  # by torch
    operators._lacking.cache_clear()


def test_no_samples():
    index, present = choose_landmarks(normal(0, 2, 9, 4), 3)
    assert index.shape == present.shape == (0, 2, 3)


@pytest.mark.usefixtures("any_form")
def test_equal_candidates_are_one_landmark():
    index, present = choose_landmarks(torch.full((2, 2, 9, 4), 1.5), 5, tolerance=0.0)
    assert not index.any()
    assert torch.equal(present, torch.tensor([True] + 4 * [False]).expand(2, 2, 5))


def test_what_is_rare_is_among_the_first():
    """One of a thousand candidates, far from all others."""
    candidates = normal(1, 1, 1000, 8, scale=0.1)
    candidates[0, 0, 437] += 3
    index, _ = choose_landmarks(candidates, 4)
    assert 437 in index[0, 0, :2]


@pytest.mark.usefixtures("any_form")
def test_samples_and_heads_are_chosen_alone():
    candidates = normal(3, 2, 60, 8, scale=0.4)
    index, present = choose_landmarks(candidates, 20)
    for b in range(3):
        for h in range(2):
            one = choose_landmarks(candidates[b : b + 1, h : h + 1], 20)
            assert torch.equal(one[0][0, 0], index[b, h])
            assert torch.equal(one[1][0, 0], present[b, h])


def test_candidates_may_be_strided():
    strided = normal(2, 60, 3, 8, scale=0.4).transpose(1, 2)
    for ours, truth in zip(choose_landmarks(strided, 9), choose_landmarks(strided.clone(), 9)):
        assert torch.equal(ours, truth)


@pytest.mark.usefixtures("any_form")
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6, 1e38])
def test_any_finite_candidates(size):
    candidates = size * normal(1, 2, 40, 8, dtype=torch.float32).clamp(-3, 3)
    index, present = choose_landmarks(candidates, 9)
    assert ((index >= 0) & (index < 40)).all()
    assert present[..., 0].all()


class Largest(TorchDispatchMode):
    """How many elements the largest result of an operation has that is no view."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, torch.Tensor) and out._base is None and out.is_contiguous():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.cpu
def test_no_memory_for_landmarks_that_are_not_needed():
    """A thousand candidates in seven places, without a budget."""
    places = 4 * torch.eye(7, 8)
    candidates = places[torch.arange(1000) % 7].expand(1, 2, 1000, 8)
    with Largest() as largest:
        _, present = choice.choose(candidates, 1000, 0.1)
    assert present.sum() == 2 * 7
    assert largest.elements == 2 * 1000 * (8 + 2 + choice.ROWS)


@pytest.mark.cpu
@pytest.mark.parametrize("count", [choice.ROWS, choice.ROWS + 1, 5 * choice.ROWS])
def test_memory_that_grows_changes_no_bit(count, monkeypatch):
    """As many landmarks as there are candidates."""
    points = normal(3, count, 16, dtype=torch.float32)
    grown = choice._streamed(points, None, count, 0.0)
    monkeypatch.setattr(choice, "ROWS", count)
    at_once = choice._streamed(points, None, count, 0.0)
    assert len(grown[0]) == count
    for ours, truth in zip(grown, at_once):
        assert all(map(torch.equal, ours, truth))


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
    index, present = torch.func.vmap(lambda c: choose_landmarks(c, 6))(candidates)
    for i, each in enumerate(candidates):
        expected = choose_landmarks(each, 6)
        assert torch.equal(index[i], expected[0])
        assert torch.equal(present[i], expected[1])


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
        lambda t: landmark_patches(t, hw, 2, stride, index=index), (q,), fast_mode=True
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


def candidates_by_definition(q, hw, heads, stride, centre, valid=None):
    every = landmark_patches(q.double(), hw, heads, stride)
    return reference.salient_mean(every, centre.double(), valid).transpose(1, 2)


@pytest.mark.parametrize("band", [1, 700, 2**19])
@pytest.mark.parametrize(("hw", "stride"), [((9, 14), 2), ((17, 19), 4), ((8, 8), 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_candidates_are_those_of_the_definition(dtype, hw, stride, band, monkeypatch):
    monkeypatch.setattr(salient, "BAND", band)
    q = normal(6, hw[0] * hw[1], 2, dtype=dtype).permute(2, 1, 0).requires_grad_()
    centre = normal(2, 3, 2, seed=1, dtype=torch.float32)
    ours = landmark_candidates(q, hw, 3, stride, centre)
    assert ours.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert not ours.requires_grad
    assert error(ours, candidates_by_definition(q, hw, 3, stride, centre)) < 1e-6


def test_candidates_of_an_image_smaller_than_a_patch():
    q, centre = normal(2, 15, 6), normal(2, 2, 3, seed=1)
    valid = ((torch.arange(8) < 3)[:, None] & (torch.arange(8) < 5)).flatten()
    ours = landmark_candidates(q, (3, 5), 2, 8, centre, valid)
    torch.testing.assert_close(ours, candidates_by_definition(q, (3, 5), 2, 8, centre, valid))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e6, 1e38])
def test_candidates_of_any_finite_queries(size):
    q = size * normal(1, 64, 8, dtype=torch.float32).clamp(-3, 3)
    centre = q.double().mean(1).float().unflatten(1, (2, 4))
    assert landmark_candidates(q, (8, 8), 2, 4, centre).isfinite().all()


def test_candidates_are_the_same_where_a_program_is_recorded():
    q, centre = normal(2, 9 * 14, 6), normal(2, 3, 2, seed=1)
    plain = torch.func.vmap(lambda q, c: landmark_candidates(q[None], (9, 14), 3, 2, c[None])[0])
    expected = landmark_candidates(q, (9, 14), 3, 2, centre)
    torch.testing.assert_close(plain(q, centre), expected)
