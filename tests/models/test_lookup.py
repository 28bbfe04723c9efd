"""A task that nothing but attention can solve: one token shows a class, every token answers it."""

from functools import partial

import pytest
import torch
from loading import load_tool

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


def test_by_content_it_holds_on_a_large_grid():
    """16 times as many tokens, a sixteenth of the patches kept."""
    torch.manual_seed(0)
    model = tasks.Lookup(tasks.build_attention("content", budget=16))
    tasks.train(model, tasks.lookup, steps=120, seed=0, lr=3e-3)
    assert tasks.accuracy(model, tasks.lookup) >= 0.95
    assert tasks.accuracy(model, partial(tasks.lookup, side=64), batches=2) >= 0.95
