"""The greedy choice of landmarks, a pivoted Cholesky factorization, in plain torch."""

import torch
from torch import Tensor

from ..gaussian.kernel import COORDINATE_MAX, centre
from ..island import compute_dtype, no_autocast
from ..mode import transformed


def choose(
    candidates: Tensor, budget: int, tolerance: float, sharpness: float
) -> tuple[Tensor, Tensor]:
    """The choice, see :func:`mmsoft.ops.choose_landmarks`."""
    batch, heads, total, d = candidates.shape
    points = candidates.detach().flatten(0, 1).to(compute_dtype(candidates))
    points = points.clamp(-COORDINATE_MAX, COORDINATE_MAX)
    points = (points - centre(points)).mT.contiguous()  # [B * heads, d, M]
    half = points.square().sum(1).mul_(0.5)
    kept = torch.sym_min(total, budget)
    residual = torch.ones_like(half)  # of each candidate's own kernel value, not yet explained
    factor = half.new_zeros(*half.shape[:1], kept, total)
    index = half.new_zeros(*half.shape[:1], kept, dtype=torch.long)
    counts = half.new_zeros(*half.shape[:1], kept)
    # To ask would make a GPU wait, and cannot be recorded under a transform.
    stops = candidates.device.type == "cpu" and not transformed()
    for j in range(kept):
        pivot = (-half if j == 0 else residual).argmax(1, keepdim=True)
        left = residual.gather(1, pivot)
        new = left > tolerance
        if stops and not new.any():
            break
        point = points.gather(2, pivot[:, None].expand(-1, d, 1))
        own = half.gather(1, pivot)
        with no_autocast(points):
            row = (point.mT @ points).squeeze(1)
            row = row.sub_(half).sub_(own).clamp_(max=0).exp_().scatter(1, pivot, 1.0)
            index[:, j : j + 1] = torch.where(new, pivot, 0)
            power = row.square().square() if sharpness == 4 else row.pow(sharpness)
            counts[:, j] = power.sum(1) * new.squeeze(1)
            past = factor[:, :j].gather(2, pivot[:, None].expand(-1, j, 1))
            row = row - (past.mT @ factor[:, :j]).squeeze(1)
        row = torch.where(new, row * left.clamp(min=1e-12).rsqrt(), 0)
        factor[:, j] = row
        residual = torch.addcmul(residual, row, row, value=-1).scatter(1, pivot, -1.0)
    return index.unflatten(0, (batch, heads)), counts.unflatten(0, (batch, heads))
