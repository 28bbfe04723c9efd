"""Where landmarks are sampled: disjoint patches of the token grid, at most so many of them."""

import torch
from torch import Tensor

from ..checks import check_patches
from .grid import landmark_centres, landmark_grid
from .operators import patches

__all__ = ["landmark_centres", "landmark_grid", "landmark_patches"]


def landmark_patches(
    q: Tensor,
    hw_shape: tuple[int, int],
    num_heads: int,
    stride: int,
    max_landmarks: int | None = None,
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

    Returns:
        ``[B, m, h, r*r, d]``, where ``m`` is the product of :func:`landmark_grid`.

    Raises:
        TypeError, ValueError: ``q`` does not have ``H*W`` tokens of ``h`` heads, or a number is not
            positive.
    """
    if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
        hw_shape = (int(hw_shape[0]), int(hw_shape[1]))
    check_patches(q, hw_shape, num_heads, stride, max_landmarks)
    return patches(q, *hw_shape, num_heads, stride, max_landmarks)
