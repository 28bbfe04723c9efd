"""The Moore-Penrose inverse of the landmarks' Gram matrix ``A``, two ways.

Both are spectral filters of ``A``, which invert large eigenvalues and damp small ones.
:func:`newton_raphson_pinv` is the paper's iteration, whose step rule and number of steps are part
of a trained model; :func:`tikhonov_pinv_product` is a regularized solve by one Cholesky
factorization. ``docs/method.md`` derives them.
"""

import torch
from torch import Tensor

from ..island import matmul
from . import eager
from .eager import newton_iterates
from .operators import newton, tikhonov_solve

__all__ = [
    "RIDGE_SOFT",
    "TIKHONOV",
    "guarded_newton_pinv",
    "newton_iterates",
    "newton_raphson_pinv",
    "step_size",
    "tikhonov_pinv_product",
]

# SOFT inverts A + 0.01 I; SOFT++ inverts A itself (authors' release).
RIDGE_SOFT = 0.01
# The guard accepts alpha |A^2| of about 0.01, so 20 steps damp below sqrt(100 / 2^20) = 0.01 |A|.
TIKHONOV = 0.01


def step_size(a: Tensor, guarded: bool) -> tuple[Tensor, Tensor]:
    """The released step size ``alpha``, computed without reading anything back from the device.

    Args:
        a: Gram matrices of a Gaussian kernel, ``[B, heads, m, m]``.
        guarded: False for SOFT's ``1.8 / (largest row sum)^2`` of each matrix. True for SOFT++'s
            ``2 / (largest row sum)^2``, halved at most 10 times while the largest column sum of
            ``|I - alpha A^2|`` exceeds 1.01; both maxima run over the heads of one sample, so that
            a sample does not depend on its batch mates (they run over the batch in the release).

    Returns:
        ``alpha`` and ``cubic``, each ``[B, heads or 1, 1, 1]``, without gradient: Newton-Raphson
        starts from ``alpha A - cubic A^3``. ``cubic`` is 0 except where the guard accepts at once,
        from where the release may go to 0 instead of the inverse.
    """
    if not guarded:
        alpha = 1.8 / a.detach().sum(-1).amax(-1)[..., None, None].square()
        return alpha, torch.zeros_like(alpha)
    return eager.step_size(a.detach())


def newton_raphson_pinv(a: Tensor, alpha: Tensor, cubic: Tensor, steps: int = 20) -> Tensor:
    """``steps`` Newton-Raphson steps ``X <- 2X - X A X`` from ``X_0 = alpha A - cubic A^3``.

    The backward pass is that of an inverse (SOFT, proposition 3); it stores the result alone, and
    can itself be differentiated. Forward mode follows it.

    Args:
        a: symmetric matrices ``[B, heads, m, m]``, float32 or float64.
        alpha: from :func:`step_size`, broadcastable to ``a``; taken as a constant.
        cubic: likewise.
        steps: number of steps ``T``.

    Returns:
        ``[B, heads, m, m]``.
    """
    return newton(a, alpha, cubic, steps)


def guarded_newton_pinv(a: Tensor, steps: int = 20) -> Tensor:
    """``newton_raphson_pinv(a, *step_size(a, guarded=True), steps)`` as one operator.

    So that a kernel can find the step size itself: one launch in place of a dozen.

    Args:
        a: Gram matrices of a Gaussian kernel, ``[B, heads, m, m]``, float32 or float64.
        steps: number of steps ``T``.

    Returns:
        ``[B, heads, m, m]``.
    """
    return newton(a, None, None, steps)


def tikhonov_pinv_product(a: Tensor, b: Tensor) -> Tensor:
    """``(A^2 + mu^2 I)^-1 A b`` with ``mu`` = 0.01 times the largest row sum of ``A``.

    ``mu`` is taken as a constant in the backward pass, as Newton-Raphson takes its ``alpha``. What
    is factorized has condition number 1e4 at most, whatever ``A`` is.

    Args:
        a: ``[B, heads, m, m]``, symmetric, entries >= 0, not all 0; float32 or float64.
        b: ``[B, heads, m, d]``.

    Returns:
        ``[B, heads, m, d]``, twice differentiable.
    """
    mu = TIKHONOV * a.detach().sum(-1).amax(-1)[..., None, None]
    return tikhonov_solve(a, mu, matmul(a, b))
