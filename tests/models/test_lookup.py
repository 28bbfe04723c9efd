"""A task that nothing but attention can solve: one token shows a class, every token answers it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.layers import SOFTBlock

SIDE, CLASSES, DIMS = 16, 8, 64


class NoAttention(SoftmaxFreeAttention):
    def attend(self, q, v, hw_shape):
        return torch.zeros_like(v)


class Lookup(nn.Module):
    """Class embedding at one place, one block without the values' convolution, classifier."""

    def __init__(self, attention: bool):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, DIMS)
        self.position = nn.Parameter(0.02 * torch.randn(1, SIDE * SIDE, DIMS))
        kind = SoftmaxFreeAttention if attention else NoAttention
        attn = kind(DIMS, 2, landmark_stride=4, value_kernel=3, normalize=True, solver="direct")
        nn.init.zeros_(attn.value_conv.weight).requires_grad_(False)
        self.block = SOFTBlock(DIMS, attn, 0.0, 0.0)
        self.head = nn.Linear(DIMS, CLASSES)

    def forward(self, classes, places):
        shown = F.one_hot(places, SIDE * SIDE)[..., None] * self.embed(classes)[:, None]
        return self.head(self.block(self.position + shown, (SIDE, SIDE)))


def batch(size: int, g: torch.Generator):
    return (
        torch.randint(CLASSES, (size,), generator=g),
        torch.randint(SIDE * SIDE, (size,), generator=g),
    )


@pytest.mark.parametrize("attention", [True, False])
def test_a_block_answers_a_lookup_only_with_attention(attention):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    model = Lookup(attention)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * step / steps)
        classes, places = batch(16, g)
        answers = model(classes, places).flatten(0, 1)
        loss = F.cross_entropy(answers, classes.repeat_interleave(SIDE * SIDE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classes, places = batch(256, g)
    with torch.no_grad():
        right = model(classes, places).argmax(-1) == classes[:, None]
    if attention:
        assert right.float().mean() >= 0.95
    else:
        assert right.float().mean() < 0.25  # chance is 0.125
