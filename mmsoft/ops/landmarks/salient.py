"""Means of patches in which what is unlike the rest of the image counts most."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gaussian.kernel import COORDINATE_MAX
from ..island import compute_dtype, matmul
from ..mode import constants

# Of squared distances: sums of a few stay finite, and equal tokens have a weight.
DISTANCE_MIN, DISTANCE_MAX = 1e-12, 1e30
BAND = 2**19  # numbers that are worked on at a time: they stay in the caches


def salient_mean(patches: Tensor, centre: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of each patch, its tokens weighted by their squared distances from ``centre``.

    A patch of equal tokens has the plain mean; of a patch with one token unlike the rest of the
    image, it is that token. The weights are constants in the backward pass.

    Args:
        patches: ``[B, m, h, n, d]``.
        centre: ``[B, h, d]``, the mean query of each head.
        valid: ``[n]``, or of any shape that broadcasts to ``[B, m, h, n]``, bool: the tokens that
            are not padding; ``None`` for all. Padding must be finite.

    Returns:
        ``[B, m, h, d]``, float32 (float64 for float64 arguments); 0 of a patch of padding alone.
    """
    patches = patches.to(compute_dtype(patches))
    with constants():
        origin = centre.to(patches.dtype)[:, None, :, None]
        weights = (patches - origin).square_().sum(-1).clamp(DISTANCE_MIN, DISTANCE_MAX)
        if valid is not None:
            weights = weights * valid
        weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))[..., None, :]
    return matmul(weights, patches).squeeze(-2)


def of_bands(q: Tensor, height: int, width: int, heads: int, stride: int, centre: Tensor) -> Tensor:
    """:func:`mmsoft.ops.landmark_candidates` of an image of a patch at least, band by band.

    Queries further than 1e9 from the centre count as that far.
    """
    dtype = compute_dtype(q)
    image = q.reshape(q.shape[0], height, width, heads, centre.shape[2])
    rows, cols = height // stride, width // stride
    origin = centre.to(dtype)[:, None, None]

    def of_band(first: int, last: int) -> Tensor:
        band = image[:, first * stride : last * stride, : cols * stride]
        offset = (band.to(dtype) - origin).clamp_(-COORDINATE_MAX, COORDINATE_MAX)
        weight = torch.linalg.vector_norm(offset, dim=-1, keepdim=True).square_()
        weight.clamp_(min=DISTANCE_MIN)
        offset.mul_(weight)
        offset, weight = (
            F.avg_pool2d(t.flatten(3).permute(0, 3, 1, 2), stride)
            .permute(0, 2, 3, 1)
            .unflatten(3, (heads, -1))
            for t in (offset, weight)
        )
        return offset.div_(weight).add_(origin)

    step = rows  # of a GPU, which has no such caches and launches for every band
    if q.device.type == "cpu":
        step = max(1, BAND // max(1, q.shape[0] * q.shape[2] * stride * width))
    if step >= rows:
        means = of_band(0, rows)
    else:
        means = q.new_empty(q.shape[0], rows, cols, *centre.shape[1:], dtype=dtype)
        for first in range(0, rows, step):
            means[:, first : first + step] = of_band(first, min(first + step, rows))
    return means.flatten(1, 2).transpose(1, 2)
