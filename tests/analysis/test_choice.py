"""An even grid of the candidates in place of the choice by content."""

import pytest
import torch
from released import ARCH

from mmsoft.analysis import attention_blocks, capture, even_choice
from mmsoft.models import SOFTPlusPlus


def states_of(model, image):
    with torch.no_grad(), capture(model) as states:
        model(image)
    return states


def test_the_candidates_are_the_same_and_the_grid_is_even():
    """All of the budget, whatever they hold; then the choice is again by content."""
    torch.manual_seed(0)
    model = SOFTPlusPlus(ARCH, max_landmarks=None).eval()
    image = torch.ones(1, 3, 96, 160)
    image[..., 1] = 2  # almost all alike: the choice takes few of them
    before = states_of(model, image)[0, 0]
    assert before.present.sum() < 12
    layer = before.layer
    with even_choice(attention_blocks(model).values()):
        every = states_of(model, image)[0, 0]
        layer.max_landmarks = 4
        kept = states_of(model, image)[0, 0]
    # 3 x 5 patches of 8 x 8 tokens
    assert every.index.tolist() == [[list(range(15))]]
    assert kept.index.tolist() == [[[0 * 5 + 1, 0 * 5 + 3, 2 * 5 + 1, 2 * 5 + 3]]]
    assert every.present.all()
    assert kept.present.all()
    assert torch.equal(kept.landmarks, every.landmarks[:, :, kept.index[0, 0]])
    chosen = before.index[before.present]
    assert torch.equal(before.landmarks[before.present], every.landmarks[0, 0, chosen])
    layer.max_landmarks = None
    assert torch.equal(states_of(model, image)[0, 0].index, before.index)


def test_padding_is_no_part_of_the_grid():
    model = SOFTPlusPlus(ARCH, max_landmarks=4, out_indices=(0,)).eval()
    images = torch.randn(2, 3, 160, 160)
    images[1, :, 32:] = 0  # one row of the 5 x 5 patches is left
    with even_choice(attention_blocks(model).values()):
        state = states_of(model, images)[0, 0]
    rows = [[6, 8, 16, 18], [0, 1, 3, 4]]
    assert state.index.tolist() == [[row] for row in rows]
    model.stages[0].blocks[0].attn.max_landmarks = 9
    with even_choice(attention_blocks(model).values()):
        state = states_of(model, images)[0, 0]
    assert state.present.sum(-1).flatten().tolist() == [9, 5]
    assert state.index[1, 0][state.present[1, 0]].tolist() == [0, 1, 2, 3, 4]


def test_released_landmarks_are_not_chosen():
    layers = attention_blocks(SOFTPlusPlus(ARCH, landmarks="released")).values()
    message = "are an even grid: nothing chooses them"
    with pytest.raises(ValueError, match=message), even_choice(layers):
        pass
