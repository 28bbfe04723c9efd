"""Padding, of tokens and of landmarks: it changes nothing, to the last bit, whatever it holds."""

import pytest
import torch
from metrics import error
from on_device import device_type
from operators import FLOAT16, VARIANTS, jvp_of_duals, opcheck

from mmsoft.ops import (
    choose_landmarks,
    landmark_attention,
    reference,
    salient_mean,
    softmax_free_attention,
)
from mmsoft.ops.gaussian import eager
from mmsoft.ops.landmarks import choice
from mmsoft.ops.landmarks.operators import CHOICE

LENGTHS = (63, 1, 40)  # of 63 tokens; one sample has no padding
KEPT = (9, 1, 4)  # of 9 landmarks


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def first(lengths, total):
    return torch.arange(total) < torch.tensor(lengths)[:, None]


def padded(dtype=torch.float64, fill=torch.nan, spread=0.5):
    """Queries, values and landmarks whose padding holds ``fill``, and both masks."""
    mask, landmark_mask = first(LENGTHS, 63), first(KEPT, 9)
    landmark_mask[2] = landmark_mask[2].flip(0)  # padding need not be at the end
    tensors = [normal(3, 2, k, 8, seed=i) for i, k in enumerate((63, 63, 9))]
    for tensor, kept in zip(tensors, (mask, mask, landmark_mask)):
        tensor.mul_(spread).masked_fill_(~kept[:, None, :, None], fill)
    return [t.to(dtype) for t in tensors], mask, landmark_mask


def run(function, tensors, *args, **kwargs):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors, *args, **kwargs)
    out.backward(normal(*out.shape, seed=7).to(out.dtype))
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_the_definition_cuts_padding_off(normalize, solver):
    """In float64: outputs and gradients of each sample are those without padding, and 0 in it."""
    tensors, mask, landmark_mask = padded()
    masks = dict(mask=mask, landmark_mask=landmark_mask)
    options = dict(normalize=normalize, solver=solver, scale=0.3)
    ours = run(softmax_free_attention, tensors, **masks, **options)
    for mine, truth in zip(
        ours, run(reference.softmax_free_attention, tensors, **masks, **options)
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-9 * float(truth.abs().max()))
    for result, kept in zip(ours, (mask, mask, mask, landmark_mask)):
        assert not result.transpose(1, 2)[~kept].any()
    q, v, landmarks = (t[2, None] for t in tensors)
    alone = softmax_free_attention(
        q[:, :, : LENGTHS[2]], v[:, :, : LENGTHS[2]], landmarks[:, :, -KEPT[2] :], **options
    )
    torch.testing.assert_close(ours[0][2, None, :, : LENGTHS[2]], alone)


def through_landmarks(fill, dtype):
    tensors, mask, landmark_mask = padded(dtype, fill)
    tensors[2] = torch.where(landmark_mask[:, None, :, None], tensors[2], 0.1)
    return tensors, landmark_mask[:, None].expand(-1, 2, -1), mask


def test_through_landmarks_the_definition_cuts_padding_off():
    tensors, present, mask = through_landmarks(torch.nan, torch.float64)
    ours = run(landmark_attention, tensors, present, mask=mask)
    for mine, truth in zip(ours, run(reference.landmark_attention, tensors, present, mask=mask)):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)
    for result in ours[:3]:
        assert not result.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16])
def test_through_landmarks_what_padding_holds_changes_no_bit(dtype):
    results = []
    for fill in (torch.nan, torch.inf, 0.0, 6e4):
        tensors, present, mask = through_landmarks(fill, dtype)
        results.append(run(landmark_attention, tensors, present, mask=mask))
        assert all(map(torch.equal, results[0], results[-1]))
    assert all(t.isfinite().all() for t in results[0])


def test_through_landmarks_a_sample_of_padding_alone_is_zero():
    tensors, present, mask = through_landmarks(torch.nan, torch.float32)
    whole = run(landmark_attention, tensors, present, mask=mask)
    mask[1], present = False, present.index_fill(0, torch.tensor(1), False)
    for result, before in zip(run(landmark_attention, tensors, present, mask=mask), whole):
        assert not result[1].any()
        assert torch.equal(result[::2], before[::2])


@pytest.mark.parametrize(
    ("normalize", "solver", "dtype"),
    [*((*v, torch.float32) for v in VARIANTS), (True, "direct", torch.float16)],
)
@pytest.mark.parametrize("block", [1 << 19, 1])
def test_what_padding_holds_changes_no_bit(monkeypatch, normalize, solver, dtype, block):
    """In one block or several, the kernel stored or streamed."""
    monkeypatch.setitem(eager.BLOCK_ELEMENTS, device_type(), block)
    results = []
    for fill in (torch.nan, torch.inf, 0.0, 6e4):
        tensors, mask, landmark_mask = padded(dtype, fill)
        options = dict(mask=mask, landmark_mask=landmark_mask, normalize=normalize, solver=solver)
        results.append(run(softmax_free_attention, tensors, **options))
        with torch.no_grad():
            results[-1].append(softmax_free_attention(*tensors, **options))
    assert all(t.isfinite().all() for t in results[0])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_in_float32(normalize, solver, spread):
    """Within the definition's own error in float32, far from the origin too, or 1e-5."""
    for offset in (0, 30):
        tensors, mask, landmark_mask = padded(torch.float32, spread=spread)
        tensors[0], tensors[2] = tensors[0] + offset, tensors[2] + offset
        options = dict(mask=mask, landmark_mask=landmark_mask, normalize=normalize, solver=solver)
        definition = reference.softmax_free_attention
        double = run(definition, [t.double() for t in tensors], **options)
        single = run(definition, tensors, **options)
        ours = run(softmax_free_attention, tensors, **options)
        for mine, plain, truth in zip(ours, single, double):
            assert error(mine, truth) <= max(4 * error(plain, truth), 1e-5)


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
@pytest.mark.parametrize("what", ["tokens", "landmarks", "both"])
def test_a_sample_of_padding_alone_is_zero(normalize, solver, what):
    tensors, mask, landmark_mask = padded(torch.float32)
    whole = run(softmax_free_attention, tensors, mask=mask, landmark_mask=landmark_mask)
    for name, each, tensor in (("tokens", mask, 0), ("landmarks", landmark_mask, 2)):
        if what in (name, "both"):
            each[1], tensors[tensor][1] = False, torch.nan
    options = dict(normalize=normalize, solver=solver)
    results = run(
        softmax_free_attention, tensors, mask=mask, landmark_mask=landmark_mask, **options
    )
    for result in results:
        assert result.isfinite().all()
        assert not result[1].any()
    if (normalize, solver) == VARIANTS[0]:
        assert all(torch.equal(a[::2], b[::2]) for a, b in zip(whole, results))


def test_derivatives_under_transforms():
    tensors, mask, landmark_mask = padded()
    options = dict(mask=mask, landmark_mask=landmark_mask)
    weight = normal(3, 2, 63, 8, seed=9)

    def loss(*args):
        return (softmax_free_attention(*args, **options) * weight).sum()

    truth = [t.clone().requires_grad_() for t in tensors]
    out = reference.softmax_free_attention(*truth, **options)
    expected = torch.autograd.grad((out * weight).sum(), truth)
    for ours, grad in zip(torch.func.grad(loss, (0, 1, 2))(*tensors), expected):
        torch.testing.assert_close(ours, grad)
    tangents = [torch.randn_like(t) for t in tensors]
    total = sum((g * t).sum() for g, t in zip(expected, tangents))
    for jvp in (torch.func.jvp, jvp_of_duals):
        torch.testing.assert_close(jvp(loss, tuple(tensors), tuple(tangents))[1], total)


def test_memory_is_as_without_a_mask():
    tensors, mask, _ = padded(fill=0.0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = softmax_free_attention(*tensors, mask=mask)
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("form", ["lapack", "stored", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_candidates_of_padding_are_not_there(dtype, form, monkeypatch):
    """The choice is that of the others alone, in the same order."""
    monkeypatch.setattr(choice, "FEW", 0 if form == "streamed" else choice.FEW)
    monkeypatch.setattr(CHOICE, "asked", "eager" if form == "stored" else None)
    candidates, lengths = normal(3, 2, 50, 8, scale=0.5, dtype=dtype), (50, 3, 21)
    mask = first(lengths, 50)
    mask[2] = mask[2].flip(0)
    found = []
    for fill in (torch.nan, torch.inf, 0.0, 3e4):
        filled = candidates.masked_fill(~mask[:, None, :, None], fill)
        found.append(choose_landmarks(filled, 12, mask=mask))
        assert all(map(torch.equal, found[0], found[-1]))
    index, present = found[0]
    truth = reference.choose_landmarks(candidates.double(), 12, mask=mask)
    assert all(map(torch.equal, found[0], truth))
    for b, numbers in enumerate(mask):
        chosen, alone = choose_landmarks(candidates[b, None][:, :, numbers], 12)
        kept = chosen.shape[2]
        assert torch.equal(present[b, :, :kept], alone[0])
        assert not present[b, :, kept:].any()
        numbers = numbers.nonzero()[:, 0]
        assert torch.equal(index[b, :, :kept], torch.where(alone[0], numbers[chosen[0]], 0))
    with torch.no_grad():
        opcheck(torch.ops.mmsoft.landmark_choice, (filled, 6, 0.03, mask))


def test_no_candidate_at_all():
    index, present = choose_landmarks(
        torch.full((2, 1, 7, 4), torch.nan), 3, mask=torch.zeros(2, 7, dtype=torch.bool)
    )
    assert not index.any()
    assert not present.any()


def test_salient_means_of_patches_with_padding():
    """Each patch has padding of its own; one has nothing else, and is 0."""
    patches = normal(2, 5, 3, 16, 8)
    valid = torch.rand(2, 5, 1, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    valid[0, 1] = False
    centre = patches.mean((1, 3))
    mean = salient_mean(patches, centre, valid)
    torch.testing.assert_close(mean, reference.salient_mean(patches, centre, valid))
    assert not mean[0, 1].any()
    kept = valid[1, 2, 0]
    alone = salient_mean(patches[1:, 2:3, :, kept], centre[1:])
    torch.testing.assert_close(mean[1:, 2:3], alone)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(mask=torch.ones(3, 63)), TypeError, "mask must be a bool tensor, .* torch.float32"),
        (dict(mask=[True]), TypeError, "mask must be a bool tensor, .* got list"),
        (
            dict(mask=torch.ones(3, 62).bool()),
            ValueError,
            r"mask must be of shape \(3, 63\) on (cpu|cuda:0)",
        ),
        (dict(landmark_mask=torch.ones(3, 2, 9).bool()), ValueError, r"landmark_mask .* \(3, 9\)"),
        (
            dict(mask=torch.ones(3, 63, device="meta").bool()),
            ValueError,
            r"on (cpu|cuda:0), got .* on meta",
        ),
    ],
)
def test_invalid_masks(options, kind, message):
    with pytest.raises(kind, match=message):
        softmax_free_attention(*padded()[0], **options)


def test_invalid_mask_of_candidates():
    with pytest.raises(ValueError, match=r"mask must be of shape \(1, 5\)"):
        choose_landmarks(torch.zeros(1, 2, 5, 4), 3, mask=torch.ones(1, 4).bool())
