"""The choice of landmarks in Triton, one program for each head: one launch for all steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gaussian.kernel import COORDINATE_MAX

LIMIT = tl.constexpr(COORDINATE_MAX)


@triton.jit
def _rows(pointer, row, channel, there, d, stride_n, stride_d):
    """Candidates ``[N, D]`` within the limits of coordinates, 0 where there is none."""
    inside = there[:, None] & (channel < d)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_d
    x = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _present(mask, row, total, stride_n, MASKED: tl.constexpr):
    there = row < total
    if MASKED:
        there = there & (tl.load(mask + row.to(tl.int64) * stride_n, mask=there, other=0) != 0)
    return there


@triton.jit
def choice_kernel(
    candidates, mask, index, present, residual, factor, total, heads, d, kept, tolerance,
    c_b, c_h, c_n, c_d, m_b, m_n,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The pivots of one head. ``residual [total]`` is what each candidate leaves unexplained,
    ``factor [total, K]`` the triangular factor's transpose; both are this program's own.
    """  # noqa: D205
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    candidates += b * c_b + h * c_h
    mask += b * m_b
    residual += head.to(tl.int64) * total
    factor += head.to(tl.int64) * total * K
    index += head.to(tl.int64) * kept
    present += head.to(tl.int64) * kept
    channel, column = tl.arange(0, D), tl.arange(0, K)
    tl.store(index + column, tl.zeros([K], tl.int64), mask=column < kept)
    tl.store(present + column, tl.zeros([K], tl.int8), mask=column < kept)

    mean, count = tl.zeros([D], tl.float32), 0.0
    for start in range(0, total, N):
        row = start + tl.arange(0, N)
        there = _present(mask, row, total, m_n, MASKED)
        mean += tl.sum(_rows(candidates, row, channel, there, d, c_n, c_d), 0)
        count += tl.sum(there.to(tl.float32), 0)
    mean = mean / tl.maximum(count, 1.0)
    nearest, pivot = float("inf"), 0
    for start in range(0, total, N):
        row = start + tl.arange(0, N)
        there = _present(mask, row, total, m_n, MASKED)
        away = _rows(candidates, row, channel, there, d, c_n, c_d) - mean[None, :]
        distance = tl.where(there, tl.sum(away * away, 1), float("inf"))
        least, at = tl.min(distance, 0, return_indices=True)
        pivot = tl.where(least < nearest, start + at, pivot)
        nearest = tl.minimum(nearest, least)
        tl.store(residual + row, tl.where(there, 1.0, -1.0), mask=row < total)
    left, j = tl.where(count > 0, 1.0, -1.0), 0
    tl.debug_barrier()

    while (j < kept) & (left > tolerance):
        tl.store(index + j, pivot)
        tl.store(present + j, 1)
        place = tl.cast(pivot, tl.int64)
        one = tl.load(candidates + place * c_n + channel * c_d, mask=channel < d, other=0.0)
        one = tl.minimum(tl.maximum(one.to(tl.float32), -LIMIT), LIMIT)
        own = tl.load(factor + place * K + column, mask=column < j, other=0.0)
        scale = tl.rsqrt(left)
        most, chosen = -2.0, 0
        for start in range(0, total, N):
            row = start + tl.arange(0, N)
            inside = row < total
            there = _present(mask, row, total, m_n, MASKED)
            away = _rows(candidates, row, channel, there, d, c_n, c_d) - one[None, :]
            entry = tl.exp(-0.5 * tl.sum(away * away, 1))
            before = inside[:, None] & (column < j)[None, :]
            row_of = factor + row.to(tl.int64) * K
            known = tl.load(row_of[:, None] + column[None, :], mask=before, other=0.0)
            entry = (entry - tl.sum(known * own[None, :], 1)) * scale
            tl.store(row_of + j, entry, mask=inside)
            rest = tl.load(residual + row, mask=inside, other=-2.0) - entry * entry
            rest = tl.where(row == pivot, -1.0, rest)
            # Other warps load these rows, too, for the maximum: before they are overwritten.
            tl.debug_barrier()
            tl.store(residual + row, rest, mask=inside)
            # The first of equal ones, in every block and over all.
            largest, at = tl.max(rest, 0, return_indices=True)
            chosen = tl.where(largest > most, start + at, chosen)
            most = tl.maximum(most, largest)
        tl.debug_barrier()
        pivot, left = chosen, most
        j += 1


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`mmsoft.ops.landmarks.choice.choose`."""
    batch, heads, total, d = candidates.shape
    kept = min(total, budget)
    index = candidates.new_empty((batch, heads, kept), dtype=torch.long)
    present = candidates.new_empty((batch, heads, kept), dtype=torch.bool)
    columns, channels = (max(16, triton.next_power_of_2(size)) for size in (kept, d))
    residual = candidates.new_empty((batch, heads, total), dtype=torch.float32)
    factor = candidates.new_empty((batch, heads, total, columns), dtype=torch.float32)
    there = present if mask is None else mask  # the former is not read
    choice_kernel[(batch * heads,)](
        candidates, there.view(torch.int8), index, present.view(torch.int8), residual, factor,
        total, heads, d, kept, tolerance, *candidates.stride(),
        *((0, 0) if mask is None else mask.stride()),
        MASKED=mask is not None, N=4096 // max(columns, channels, 32), D=channels, K=columns,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return index, present
