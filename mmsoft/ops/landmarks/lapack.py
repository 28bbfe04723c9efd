"""The choice of landmarks among few candidates by LAPACK's pivoted Cholesky factorization."""

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from ..island import no_autocast
from .choice import as_points, gram_matrix, nearest_their_mean


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`mmsoft.ops.landmarks.choice.choose`, head by head, on a CPU.

    LAPACK takes the largest residual first; the first landmark, which is nearest the mean, is
    taken before.
    """
    batch, heads, total = candidates.shape[:3]
    points, there = as_points(candidates, mask)
    with no_autocast(points):
        gram, first = gram_matrix(points), nearest_their_mean(points, there)
        row = gram.gather(1, first[..., None].expand(-1, 1, total))
        gram.baddbmm_(row.mT, row, alpha=-1)
        if there is not None:
            gram.masked_fill_(~(there[:, :, None] & there[:, None]), 0)
        needed = gram.diagonal(0, 1, 2).amax(1) > tolerance
    factorize = lapack.spstrf if gram.dtype == torch.float32 else lapack.dpstrf
    kept = min(total, budget)
    index = np.zeros((batch * heads, kept), np.int64)
    count = np.ones(batch * heads, np.int64)
    for h, (matrix, start, more) in enumerate(
        zip(gram.numpy(), first.flatten().tolist(), needed.tolist())
    ):
        index[h, 0] = start
        if more and kept > 1:
            _, order, rank, _ = factorize(matrix.T, tol=tolerance, overwrite_a=True)
            count[h] = min(1 + rank, kept)
            index[h, 1 : count[h]] = order[: count[h] - 1] - 1  # counted from 1
    if there is not None:
        count *= there.any(1).numpy()
    present = torch.from_numpy(np.arange(kept) < count[:, None])
    chosen = torch.where(present, torch.from_numpy(index), 0)
    return chosen.unflatten(0, (batch, heads)), present.unflatten(0, (batch, heads))
