"""The Gaussian kernel matrix ``K_ij = exp(-||x_i - y_j||^2 / 2)``, stored and differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..island import matmul

# Coordinates are clamped here so that squares cannot overflow: the kernel of two points that far
# from the landmarks is 0 (or 1, for a pair beyond the same bound) whatever their distance.
COORDINATE_MAX = 1e9


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The kernel matrix itself, for a short ``x`` and ``y``.

    Points are taken relative to a centre of ``y``, which the kernel does not notice but rounding
    does.

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``, same dtype.

    Returns:
        ``[..., n, m]`` in (0, 1], differentiable.
    """
    y = y.clamp(-COORDINATE_MAX, COORDINATE_MAX)
    origin = centre(y)
    return _near_zero(x.clamp(-COORDINATE_MAX, COORDINATE_MAX) - origin, y - origin)


def centre(y: Tensor, present: Tensor | None = None) -> Tensor:
    """The mean of the points without outliers, one of which would cost all others their digits.

    Of those that are ``present [..., m, 1]``, bool, if any is; the others must be finite.
    """
    y = y.detach()
    squared = y.square().sum(-1, keepdim=True)
    if present is not None:
        squared = squared.masked_fill(~present, torch.inf)
    near = (squared <= 16 * squared.amin(-2, keepdim=True)).to(y.dtype)
    return (near * y).sum(-2, keepdim=True) / near.sum(-2, keepdim=True)


def leave_out(points: Tensor, mask: Tensor) -> Tensor:
    """``points [..., m, d]`` with the first one of those kept in the place of each other.

    There it moves no centre far. ``mask [..., m, 1]`` is False for points that are left out, which
    may hold anything; where it is False for all, they are 0.
    """
    first = mask.to(torch.uint8).argmax(-2, keepdim=True)
    shape = (*points.shape[:-2], 1, points.shape[-1])
    stand_in = points.detach().gather(-2, first.expand(shape))
    stand_in = stand_in.masked_fill(~mask.any(-2, keepdim=True), 0)
    return torch.where(mask, points, stand_in)


def _near_zero(x: Tensor, y: Tensor) -> Tensor:
    """The kernel of centred points. In place, because large fresh memory is slow."""
    half = y.square().sum(-1).mul_(0.5)
    half_x = half if x is y else x.square().sum(-1).mul_(0.5)
    # Symmetric if x is y.
    exponent = matmul(x, y.mT).sub_(half_x[..., :, None] + half[..., None, :])
    return exponent.clamp_(max=0).exp_()


def gaussian_gram(x: Tensor, present: Tensor | None = None) -> Tensor:
    """The kernel matrix of ``x [..., m, d]`` with itself, ``[..., m, m]``: its diagonal exactly 1.

    Rounding leaves the distance of a large point from itself positive, and without a diagonal a row
    may sum to 0. A point that is not ``present [..., m]``, bool, is far from all others.
    """
    x = x.clamp(-COORDINATE_MAX, COORDINATE_MAX)
    x = x - centre(x)
    eye = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    gram = _near_zero(x, x).masked_fill(eye, 1)
    if present is None:
        return gram
    present = present[..., None]
    return torch.where(present & present.mT, gram, eye.to(gram.dtype))


def empty_like_tokens(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``[B, h, n, width]`` in memory ``[B, n, h, width]``: merging the heads is then a view."""
    batch, heads, n, _ = x.shape
    return x.new_empty((batch, n, heads, width), dtype=dtype).transpose(1, 2)


def empty_gradients(
    inputs: Sequence[Tensor], dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """For each input memory for its gradient, as :func:`empty_like_tokens`; none if not needed."""
    return tuple(
        empty_like_tokens(t, t.shape[-1], dtype) if need else t.new_empty((0, 0, 0, 0), dtype=dtype)
        for t, need in zip(inputs, needs)
    )
