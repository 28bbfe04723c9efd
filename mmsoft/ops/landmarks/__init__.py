"""Where landmarks are sampled: disjoint patches of the token grid, at most so many of them."""

import torch
from torch import Tensor

from ..checks import check_choice, check_patches
from ..mode import constants, traced, transformed
from .grid import landmark_centres, landmark_grid
from .operators import choose, patches
from .salient import of_bands, salient_mean

__all__ = [
    "choose_landmarks",
    "landmark_candidates",
    "landmark_centres",
    "landmark_grid",
    "landmark_patches",
    "salient_mean",
]


def landmark_patches(
    q: Tensor,
    hw_shape: tuple[int, int],
    num_heads: int,
    stride: int,
    max_landmarks: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """The patches of tokens that landmarks are made from, head by head.

    A convolution whose stride is its kernel is a product with such patches. With a budget that is
    exceeded, patches at even distances are taken; those between are not looked at. An image
    smaller than one patch is padded with zeros.

    Args:
        q: ``[B, H*W, C]``, row by row.
        hw_shape: ``(H, W)``.
        num_heads: heads ``h``; d = C / h channels each.
        stride: side ``r`` of a patch.
        max_landmarks: at most this many patches; ``None`` for all.
        index: ``[B, h, m]``, int64, the patches of each head to take in place of those, numbered
            row by row; one may be taken more than once.

    Returns:
        ``[B, m, h, r*r, d]``, where ``m`` is that of ``index`` or the product of
        :func:`landmark_grid`.

    Raises:
        TypeError, ValueError: ``q`` does not have ``H*W`` tokens of ``h`` heads, or a number is not
            positive.
    """
    if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
        hw_shape = (int(hw_shape[0]), int(hw_shape[1]))
    check_patches(q, hw_shape, num_heads, stride, max_landmarks, index)
    return patches(q, *hw_shape, num_heads, stride, max_landmarks, index)


def landmark_candidates(
    q: Tensor,
    hw_shape: tuple[int, int],
    num_heads: int,
    stride: int,
    centre: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The :func:`salient_mean` of every patch, without gradients.

    Args:
        q: ``[B, H*W, C]``, row by row.
        hw_shape: ``(H, W)``.
        num_heads: heads ``h``; d = C / h channels each.
        stride: side ``r`` of a patch.
        centre: ``[B, h, d]``, the mean query of each head.
        valid: ``[r*r]``, bool, the tokens of a patch that are not padding; ``None`` for all.

    Returns:
        ``[B, h, M, d]``, float32 (float64 for float64 arguments); ``M`` as
        :func:`landmark_patches` has patches.

    Raises:
        TypeError, ValueError: as by :func:`landmark_patches`.
    """
    if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
        hw_shape = (int(hw_shape[0]), int(hw_shape[1]))
    check_patches(q, hw_shape, num_heads, stride, None, None)
    with constants():
        if not (traced(q) or transformed()) and min(hw_shape) >= stride:
            return of_bands(q, *hw_shape, num_heads, stride, centre)
        every = patches(q, *hw_shape, num_heads, stride, None, None)
        return salient_mean(every, centre, valid).transpose(1, 2)


def choose_landmarks(
    candidates: Tensor, budget: int, *, tolerance: float = 0.1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the landmarks that explain the candidates best, head by head.

    A pivoted Cholesky factorization of the candidates' Gram matrix: the first landmark is the one
    nearest their mean, each next one that which those before explain worst (Fine and Scheinberg
    2001; Harbrecht, Peters and Schneider 2012). ``O(M k^2)`` time and ``O(M k)`` memory: linear in
    the image with a budget; ``[M, M]`` is stored of up to 128 candidates only, which LAPACK
    factorizes on a CPU where there is SciPy (as with mmdet and mmseg). Samples and heads do not
    depend on each other; which one of candidates whose residuals are equal up to rounding is taken
    depends on what computes it, but is always the same there.

    Args:
        candidates: ``[B, h, M, d]``.
        budget: at most this many landmarks.
        tolerance: a candidate is not taken once so little of its kernel value of 1 is left
            unexplained; in [0, 1).
        mask: ``[B, M]``, bool, False for candidates made from padding, which are not there whatever
            they hold.

    Returns:
        ``index``, ``[B, h, k]`` in the order of the choice, int64, ``k = min(M, budget)``; and
        ``present``, bool, likewise: False, with index 0, where fewer landmarks suffice. Each head
        has at least one.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
        budget = int(budget)
    check_choice(candidates, budget, tolerance, mask)
    return choose(candidates, budget, float(tolerance), mask)
