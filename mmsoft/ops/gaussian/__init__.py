"""Products with the Gaussian kernel matrix ``K_ij = exp(-||x_i - y_j||^2 / 2)``."""

import torch
from torch import Tensor

from .kernel import gaussian_gram, gaussian_kernel, leave_out
from .operators import product_in_units

__all__ = [
    "gaussian_gram",
    "gaussian_kernel",
    "gaussian_kernel_product",
    "leave_out",
    "unit_of",
]

# Sums of values within 2^-40 and 2^40, times what the inverse may amplify, are far from any limit.
_MODERATE = 40


def gaussian_kernel_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """``K w`` with ``K_ij = exp(-||x_i - y_j||^2 / 2)``, storing ``K`` in blocks.

    Time is ``O(n m d)``; extra memory is one block of ``K`` whatever ``n``, two in the
    backward pass, and a few tensors of its rows of points and values: in float32 a block is 2 MiB
    on a CPU and 128 MiB on a GPU, or 32 rows of ``K`` if these are more. Strided and
    expanded arguments are read in place. Under a transform of ``torch.func``, or in forward mode,
    ``K`` is stored.

    Args:
        x: ``[B, heads, n, d]``.
        y: ``[B, heads, m, d]``.
        w: ``[B, heads, m, d_w]``.

    Returns:
        ``[B, heads, n, d_w]`` in float32 (float64 if any argument is), whatever autocast says. Its
        memory runs ``[B, n, heads, d_w]``. Differentiable once in all three arguments, in forward
        mode and by ``torch.func`` any number of times.
    """
    return product_in_units(x, y, w, None, divide=False)


def unit_of(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of 2 near the largest ``|w|`` of each sample, 1 if that is moderate: [B, 1, 1, 1]."""
    w = w.detach()
    largest = torch.maximum(w.amax((1, 2, 3)), -w.amin((1, 2, 3))).to(dtype)[:, None, None, None]
    tiny = torch.finfo(dtype).tiny
    unit = largest.clamp(2 * tiny, 0.5 / tiny).log2().floor().exp2()  # of normal reciprocal
    return torch.where((largest < 2.0**-_MODERATE) | (largest > 2.0**_MODERATE), unit, 1)
