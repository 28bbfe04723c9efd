"""How many landmarks there are on a grid of tokens, and where."""

import math

import torch
from torch import Tensor

from ..library import larger, smaller


def landmark_grid(
    height: int, width: int, stride: int, max_landmarks: int | None = None
) -> tuple[int, int]:
    """Rows and columns of landmarks on a grid of tokens.

    Args:
        height: rows of tokens.
        width: columns of tokens.
        stride: tokens per landmark along each axis. A remainder is cut off, as by a convolution
            without padding; there is at least one landmark.
        max_landmarks: the budget, or ``None``. A larger grid shrinks along its longer axis first,
            to a square at the most: every image then uses nearly the whole budget, and the numbers
            stay expressions of the size that ``torch.compile`` and ``torch.export`` understand.
    """
    rows, cols = larger(height // stride, 1), larger(width // stride, 1)
    if max_landmarks is not None:
        kept_rows = smaller(rows, math.isqrt(max_landmarks))
        cols = smaller(cols, max_landmarks // kept_rows)
        rows = smaller(rows, max_landmarks // cols)
    return rows, cols


def spread(size: int, kept: int, device: torch.device) -> Tensor:
    """``kept`` of ``size`` indices, at the centres of as many equal intervals."""
    return (2 * torch.arange(kept, device=device) + 1) * size // (2 * kept)


def landmark_centres(
    height: int, width: int, stride: int, max_landmarks: int | None = None
) -> Tensor:
    """Where landmarks lie on a grid of tokens; the arguments are those of :func:`landmark_grid`.

    Returns:
        ``[m, 2]``: row and column of the centre of each landmark's patch, where token (i, j) has
        its centre at (i, j). Float64.
    """
    grid = landmark_grid(height, width, stride)
    kept = landmark_grid(height, width, stride, max_landmarks)
    device = torch.device("cpu")
    rows, cols = (spread(n, k, device) * stride + (stride - 1) / 2 for n, k in zip(grid, kept))
    return torch.cartesian_prod(rows.double(), cols.double()).view(-1, 2)
