"""The greedy choice of landmarks, a pivoted Cholesky factorization, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gaussian.kernel import COORDINATE_MAX, centre
from ..island import compute_dtype, no_autocast
from ..mode import may_decide


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The choice, see :func:`mmsoft.ops.choose_landmarks`."""
    batch, heads, total, d = candidates.shape
    points = candidates.detach().flatten(0, 1).to(compute_dtype(candidates))
    points = points.clamp(-COORDINATE_MAX, COORDINATE_MAX)
    there = None  # [B * heads, M]
    if mask is not None:
        there = mask[:, None].expand(-1, heads, -1).flatten(0, 1)
        points = points.masked_fill(~there[..., None], 0)
    points = points - centre(points, None if there is None else there[..., None])
    points = points.mT  # [B * heads, d, M]
    half = points.square().sum(1, keepdim=True) * 0.5
    kept = torch.sym_min(total, budget)
    # What a step takes of its pivot lies together: -distance^2 / 2 is a product of [p, 1, -half] of
    # the pivot with [p, -half, 1] of all, and the factor's rows follow.
    right = torch.cat((points, -half, torch.ones_like(half)), 1)
    factor = half.new_zeros(half.shape[0], kept, total)
    columns = torch.cat((points, torch.ones_like(half), -half, factor), 1)
    factor, width = columns[:, d + 2 :], columns.shape[1]
    # What is left unexplained of each candidate's own kernel value, and how near the centre it is.
    residual, nearness = torch.ones_like(half[:, 0]), -half[:, 0]
    if there is not None:
        residual = residual.masked_fill(~there, -1)
        nearness = nearness.masked_fill(~there, -torch.inf)
    left, pivot = residual.amax(1, keepdim=True), nearness.argmax(1, keepdim=True)
    pivots, present = [], []
    stops = may_decide(candidates)
    for j in range(kept):
        new = left > tolerance
        if j and stops and not new.any():
            break
        pivots.append(pivot)
        present.append(new)
        column = columns.gather(2, pivot[:, None].expand(-1, width, 1)).mT
        with no_autocast(points):
            row = (column[..., : d + 2] @ right).clamp_(max=0).exp_()
            row = row.squeeze(1).scatter_(1, pivot, 1.0)
            if j:
                row = row - (column[..., d + 2 : d + 2 + j] @ factor[:, :j]).squeeze(1)
        row = row * torch.where(new, left.clamp(min=1e-12).rsqrt(), 0)
        factor[:, j] = row
        residual = torch.addcmul(residual, row, row, value=-1).scatter_(1, pivot, -1.0)
        left, pivot = residual.max(1, keepdim=True)
    chosen, taken = torch.cat(pivots, 1), torch.cat(present, 1)
    chosen, taken = (F.pad(t, (0, kept - t.shape[1])) for t in (chosen, taken))
    index = torch.where(taken, chosen, 0)
    return index.unflatten(0, (batch, heads)), taken.unflatten(0, (batch, heads))
