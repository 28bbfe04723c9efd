"""Landmarks by content without the choice: an even grid of the same candidates, for comparison."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops import landmark_centres, landmark_grid


def evenly(
    layer: SoftmaxFreeAttention, candidates: Tensor, mask: Tensor | None, hw_shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """An even grid in place of :meth:`~mmsoft.models.attention.SoftmaxFreeAttention.choose`.

    The same for every head, the whole budget, of the patches of each sample that are not padding.
    Candidates ``[B, heads, M, d]``, ``mask`` ``[B, M]``; indices and which are there,
    ``[B, heads, m]``.
    """
    rows, cols = landmark_grid(*hw_shape, layer.landmark_stride)
    if mask is None:
        mask = candidates.new_ones(len(candidates), rows * cols, dtype=torch.bool)
    index = []
    for there in mask.unflatten(1, (rows, cols)):
        inside = int(there.any(1).sum()), int(there.any(0).sum())
        row, col = landmark_centres(*inside, 1, layer.max_landmarks).long().unbind(1)
        index.append(row * cols + col)
    padded = torch.nn.utils.rnn.pad_sequence(index, batch_first=True, padding_value=-1)
    padded = padded.to(candidates.device)[:, None].expand(-1, candidates.shape[1], -1)
    return padded.clamp(min=0), padded >= 0


@contextmanager
def even_choice(layers: Iterable[SoftmaxFreeAttention]) -> Iterator[None]:
    """Layers by content take candidates at even distances, all else as it is.

    See :func:`evenly`.

    Raises:
        ValueError: a layer has released landmarks, which nothing chooses.
    """
    layers = list(layers)
    if not all(layer.by_content for layer in layers):
        raise ValueError("landmarks='released' are an even grid: nothing chooses them")
    for layer in layers:
        layer.choose = partial(evenly, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.choose
