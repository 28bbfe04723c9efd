"""Whether a model's attention depends on the token, and how large its term is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmsoft.ops import gaussian_kernel

from .capture import BlockState


@dataclass
class Usage:
    """What one softmax-free attention layer makes of its images, means over them, ``[heads]`` each.

    Attributes:
        landmarks: how many there are.
        nearest: median over the tokens of the largest kernel value of a token: near 0, and tokens
            resemble no landmark.
        rank: effective rank of ``K``, by content of ``softmax((q - mean) l^T)``, which the layer
            reads with: ``(sum s^2)^2 / sum s^4`` of the singular values ``s``. Near 1, all rows are
            multiples of one.
        ratio: standard deviation of the attention term over that of the values' convolution.
        varying: share of the former that differs between the tokens of an image, in [0, 1].
    """

    landmarks: Tensor
    nearest: Tensor
    rank: Tensor
    ratio: Tensor
    varying: Tensor


@torch.no_grad()
def attention_usage(state: BlockState) -> Usage:
    """Measure a layer that :func:`mmsoft.analysis.capture` has recorded, in float64.

    Tokens that are padding do not count.
    """
    heads = (state.q.shape[1], -1)
    v, padding = state.v.transpose(1, 2).flatten(2), () if state.inside is None else (state.inside,)
    convolved = state.layer.convolve_values(v, state.hw_shape, *padding)
    terms = (t.unflatten(2, heads).transpose(1, 2) for t in (state.attend(), convolved))
    images = [t.double().unbind() for t in (state.q, state.landmarks, *terms)]
    present, mask = (
        len(state.q) * [None] if t is None else t.unbind() for t in (state.present, state.mask)
    )
    found = [_of_image(*each) for each in zip(*images, present, mask)]
    return Usage(*(torch.stack(values).mean(0) for values in zip(*found)))


def _of_image(
    points: Tensor,
    landmarks: Tensor,
    term: Tensor,
    convolved: Tensor,
    present: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The values of :class:`Usage` from ``[heads, N, d]`` of tokens and ``[heads, m, d]``."""
    if mask is not None:
        points, term, convolved = (t[:, mask] for t in (points, term, convolved))
    rows = kernel = gaussian_kernel(points, landmarks)
    count = kernel.new_full(kernel.shape[:1], kernel.shape[-1])
    if present is not None:
        missing = ~present[:, None]
        kernel, count = kernel.masked_fill(missing, 0), present.double().sum(-1)
        relative = points - points.mean(1, keepdim=True)
        rows = (relative @ landmarks.mT).masked_fill(missing, -torch.inf).softmax(-1)
    energy = torch.linalg.eigvalsh(rows.mT @ rows).clamp(min=0)
    rank = energy.sum(-1).square() / energy.square().sum(-1)
    size = term.std((-2, -1))
    around = (term - term.mean(-2, keepdim=True)).std((-2, -1))
    tiny = torch.finfo(size.dtype).tiny
    return (
        count,
        kernel.amax(-1).median(-1).values,
        rank,
        size / convolved.std((-2, -1)).clamp(min=tiny),
        around / size.clamp(min=tiny),
    )
