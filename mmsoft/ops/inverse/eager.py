"""Both inverses in plain torch."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from ..island import matmul, no_autocast

HALVINGS = 10
GUARD = 1.01


def step_size(a: Tensor) -> tuple[Tensor, Tensor]:
    """The guarded step size of :func:`mmsoft.ops.step_size`: ``alpha`` and ``cubic``."""
    rows = a.sum(-1)
    # Column sums of |I - alpha A^2| from the diagonal of A^2 and its column sums: docs/method.md.
    diagonal = a.square().sum(-1)
    with no_autocast(a):
        columns = (a @ rows[..., None]).squeeze(-1)
    numbers = torch.arange(HALVINGS, dtype=a.dtype, device=a.device)
    alpha = 2 / rows.amax((-2, -1), keepdim=True).square()  # [B, 1, 1]
    candidates = alpha[..., None] * torch.exp2(-numbers)  # [B, 1, 1, 10]
    off_diagonal = (columns - diagonal)[..., None]
    norm = (1 - candidates * diagonal[..., None]).abs() + candidates * off_diagonal
    # Integers, of which a GPU has a deterministic sum.
    accepted = 1 - (norm.amax((1, 2)) > GUARD).to(torch.int32)
    rejected = (accepted.cumsum(-1) == 0).to(a.dtype).sum(-1)[:, None, None]  # [B]
    alpha = alpha * torch.exp2(-rejected)
    cubic = torch.where(rejected == 0, alpha.square() / 4, 0)
    return alpha[..., None], cubic[..., None]


def newton_iterates(a: Tensor, alpha: Tensor, cubic: Tensor) -> Iterator[Tensor]:
    """The start and every further iterate of :func:`newton_raphson_pinv`, without end or gradient.

    Args:
        a: symmetric matrices ``[..., m, m]``.
        alpha: broadcastable to ``a``.
        cubic: likewise.
    """
    shape = a.shape
    with no_autocast(a):
        x = (alpha * a - cubic * (a @ (a @ a))).flatten(0, -3)
    a = a.flatten(0, -3)
    while True:
        yield x.view(shape)
        with no_autocast(a):
            x = torch.baddbmm(x, x, a @ x, beta=2, alpha=-1)


def newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    """The iterate after ``steps`` steps; without ``alpha`` and ``cubic``, of the guarded start."""
    if alpha is None or cubic is None:
        alpha, cubic = step_size(a)
    return next(islice(newton_iterates(a, alpha, cubic), steps, None))


def newton_backward(x: Tensor, grad: Tensor) -> Tensor:
    """``-X^T G X^T``, the gradient of ``A``, all ``[B, heads, m, m]``; differentiable."""
    return -matmul(matmul(x.mT, grad), x.mT)


def solve(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    """``(A^2 + mu^2 I)^-1 b`` by a Cholesky factorization; NaN where it fails, as on NaN."""
    with no_autocast(a):
        normal = a @ a
        normal.diagonal(dim1=-2, dim2=-1).add_(mu.square().squeeze(-1))
        factor, info = torch.linalg.cholesky_ex(normal)
        failed = (info > 0)[..., None, None]  # not looked at here: that would make a GPU wait
        # cholesky_solve takes a GPU's matrices one after the other, or waits for them.
        half = torch.linalg.solve_triangular(factor, b, upper=False)
        solution = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return solution.masked_fill(failed, torch.nan).contiguous()


def solve_backward(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``-(Y X^T A^T + A Y X^T)``, the gradient of ``A``; differentiable.

    ``x`` and ``y``, ``[B, heads, m, d]``, solve for ``b`` and for the gradient of ``x``; ``a`` and
    the result are ``[B, heads, m, m]``.
    """
    return -(matmul(y, matmul(a, x).mT) + matmul(matmul(a, y), x.mT))
