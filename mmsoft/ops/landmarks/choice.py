"""The greedy choice of landmarks, a pivoted Cholesky factorization, in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gaussian.kernel import COORDINATE_MAX, centre
from ..island import compute_dtype, no_autocast
from ..mode import may_decide, traced, transformed

FEW = 128  # candidates whose Gram matrix is stored
STEPS_UNSEEN = 4  # between two looks at whether a landmark is still missing
ROWS = 64  # of the factor that are stored at first, where it is seen how many there will be


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The choice, see :func:`mmsoft.ops.choose_landmarks`."""
    batch, heads, total = candidates.shape[:3]
    points, there = as_points(candidates, mask)
    stored = not (traced(candidates) or transformed()) and total <= FEW
    with no_autocast(points):
        lefts, pivots = (_stored if stored else _streamed)(points, there, budget, tolerance)
    index, present = torch.cat(pivots, 1), torch.cat(lefts, 1) < math.inf
    index = torch.where(present, index, 0)
    missing = torch.sym_min(total, budget) - len(pivots)
    index, present = (F.pad(t, (0, missing)).unflatten(0, (batch, heads)) for t in (index, present))
    return index, present


def as_points(candidates: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Candidates ``[B * heads, M, d]`` near 0, and which there are, ``[B * heads, M]``."""
    points = candidates.detach().flatten(0, 1).to(compute_dtype(candidates))
    points = points.clamp(-COORDINATE_MAX, COORDINATE_MAX)
    there = None
    if mask is not None:
        there = mask[:, None].expand(-1, candidates.shape[1], -1).flatten(0, 1)
        points = points.masked_fill(~there[..., None], 0)
    return points - centre(points, None if there is None else there[..., None]), there


def gram_matrix(points: Tensor) -> Tensor:
    """The kernel of all points with each other; its diagonal is exactly 1."""
    half = points.square().sum(-1, keepdim=True) * 0.5
    gram = torch.baddbmm(half.mT, points, points.mT, beta=-1).sub_(half).clamp_(max=0).exp_()
    gram.diagonal(0, 1, 2).fill_(1)
    return gram


def nearest_their_mean(points: Tensor, there: Tensor | None) -> Tensor:
    """The point ``[B * heads, 1]`` that is nearest the mean of those that are there."""
    if there is None:
        return (points - points.mean(1, keepdim=True)).square().sum(-1).argmin(1, keepdim=True)
    counted = there[..., None].to(points.dtype)
    mean = (points * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    distance = (points - mean).square().sum(-1).masked_fill(~there, math.inf)
    return distance.argmin(1, keepdim=True)


def _exhausted(left: Tensor, j: int) -> bool:
    """Whether no head needs another landmark, where a value may be looked at."""
    return j > 0 and j % STEPS_UNSEEN == 0 and may_decide(left) and bool(torch.isinf(left).all())


def _stored(
    points: Tensor, there: Tensor | None, budget: int, tolerance: float
) -> tuple[list[Tensor], list[Tensor]]:
    """What the pivots ``[B * heads, 1]`` leave unexplained before, infinite of no landmark."""
    gram = gram_matrix(points)
    residual = gram.diagonal(0, 1, 2)
    if there is not None:
        residual.masked_fill_(~there, -1)
    left, pivot = residual.amax(1, keepdim=True), nearest_their_mean(points, there)
    lefts, pivots = [], []
    for j in range(min(gram.shape[1], budget)):
        left = F.threshold(left, tolerance, math.inf)
        if _exhausted(left, j):
            break
        lefts.append(left)
        pivots.append(pivot)
        row = gram.gather(1, pivot[..., None].expand(-1, 1, gram.shape[2]))
        # The Schur complement. It leaves a landmark exactly 0 of itself.
        gram.baddbmm_(row.mT, row / left[..., None], alpha=-1)
        left, pivot = residual.max(1, keepdim=True)
    return lefts, pivots


def _streamed(
    points: Tensor, there: Tensor | None, budget: int, tolerance: float
) -> tuple[list[Tensor], list[Tensor]]:
    """As :func:`_stored`, with a row of the factor stored for each landmark.

    They double as they are needed where it may be seen that no more are: without a budget few
    landmarks may do for many candidates.
    """
    total, d = points.shape[1:]
    pivot = nearest_their_mean(points, there)
    points = points.mT  # [B * heads, d, M]
    half = points.square().sum(1, keepdim=True) * 0.5
    kept = torch.sym_min(total, budget)
    # What a step takes of its pivot lies together: -distance^2 / 2 is a product of [p, 1, -half] of
    # the pivot with [p, -half, 1] of all, and the factor's rows follow.
    right = torch.cat((points, -half, torch.ones_like(half)), 1)
    rows = min(kept, ROWS) if may_decide(half) else kept
    columns = torch.cat((points, torch.ones_like(half), -half), 1)
    columns = F.pad(columns, (0, 0, 0, rows))
    residual = torch.ones_like(half[:, 0])
    if there is not None:
        residual = residual.masked_fill(~there, -1)
    left = residual.amax(1, keepdim=True)
    lefts, pivots = [], []
    for j in range(kept):
        left = F.threshold(left, tolerance, math.inf)
        if _exhausted(left, j):
            break
        lefts.append(left)
        pivots.append(pivot)
        if j == rows:
            rows = min(2 * rows, kept)
            columns = F.pad(columns, (0, 0, 0, rows - j))
        column = columns.gather(2, pivot[:, None].expand(-1, columns.shape[1], 1)).mT
        row = (column[..., : d + 2] @ right).clamp_(max=0).exp_()
        row = row.squeeze(1).scatter_(1, pivot, 1.0)
        if j:
            before = slice(d + 2, d + 2 + j)
            row = row - (column[..., before] @ columns[:, before]).squeeze(1)
        row = row * left.rsqrt()
        columns[:, d + 2 + j] = row
        residual = torch.addcmul(residual, row, row, value=-1).scatter_(1, pivot, -1.0)
        left, pivot = residual.max(1, keepdim=True)
    return lefts, pivots
