"""A task that nothing but attention can solve: one token shows a class, every token answers it."""

from functools import partial

import pytest
import torch
from loading import load_tool

from mmsoft.ops import choose_landmarks

tasks = load_tool("analysis_tools/attention_tasks.py")


@pytest.mark.parametrize(
    ("attention", "steps", "low", "high"),
    [
        pytest.param("released", 300, 0.95, 1, marks=pytest.mark.long),
        ("none", 120, 0, 0.25),
    ],
)
def test_a_block_answers_a_lookup_only_with_attention(attention, steps, low, high):
    """Chance is 0.125."""
    torch.manual_seed(0)
    model = tasks.Lookup(tasks.build_attention(attention))
    tasks.train(model, tasks.lookup, steps=steps, seed=0, lr=3e-3)
    assert low <= tasks.accuracy(model, tasks.lookup) <= high


def test_ablations_of_landmarks_by_content():
    """An even grid of the same candidates; a choice among the plain means of patches."""
    torch.manual_seed(0)
    q = torch.randn(2, 16 * 16, tasks.DIMS).cumsum(1).div(9).requires_grad_()
    content, even, mean = (
        tasks.build_attention(name, budget=9).sample_landmarks(q, (16, 16))
        for name in ("content", "even", "mean")
    )
    every = tasks.build_attention("even", budget=16).sample_landmarks(q, (16, 16))[0]
    assert even[2][1].tolist() == [[0, 2, 3, 8, 10, 11, 12, 14, 15]] * 2
    for name, (landmarks, present, index) in (("content", content), ("even", even)):
        of_all = every.gather(2, index[..., None].expand_as(landmarks))
        torch.testing.assert_close(landmarks[present], of_all[present], msg=name)
    assert not torch.equal(content[2], even[2])
    patches = q.view(2, 4, 4, 4, 4, 2, 32).permute(0, 5, 1, 3, 2, 4, 6).reshape(2, 2, 16, 16, 32)
    landmarks, present, index = mean
    plain = patches.mean(3).gather(2, index[..., None].expand_as(landmarks))
    torch.testing.assert_close(landmarks, plain)
    assert torch.equal(index, choose_landmarks(patches.mean(3), 9)[0])
    assert landmarks.requires_grad


def test_by_content_it_holds_on_a_large_grid():
    """16 times as many tokens, a sixteenth of the patches kept."""
    torch.manual_seed(0)
    model = tasks.Lookup(tasks.build_attention("content", budget=16))
    tasks.train(model, tasks.lookup, steps=120, seed=0, lr=3e-3)
    assert tasks.accuracy(model, tasks.lookup) >= 0.95
    assert tasks.accuracy(model, partial(tasks.lookup, side=64), batches=2) >= 0.95
