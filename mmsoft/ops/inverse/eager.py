"""Both inverses in plain torch."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from ..island import no_autocast


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


def newton(a: Tensor, alpha: Tensor, cubic: Tensor, steps: int) -> Tensor:
    """The iterate after ``steps`` steps."""
    return next(islice(newton_iterates(a, alpha, cubic), steps, None))


def solve(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    """``(A^2 + mu^2 I)^-1 b`` by a Cholesky factorization."""
    with no_autocast(a):
        normal = a @ a
        normal.diagonal(dim1=-2, dim2=-1).add_(mu.square().squeeze(-1))
        factor, _ = torch.linalg.cholesky_ex(normal)
        return torch.cholesky_solve(b, factor).contiguous()
