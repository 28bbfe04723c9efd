"""Products with the Gaussian kernel in Triton: blocks of ``K`` live and die in registers.

Points are taken relative to a centre of the shorter side and their distances expanded, as in
``eager.py``. Every product is of three TF32 parts (``tf32x3``), which keeps the digits of float32
whatever ``allow_tf32`` says; with a single part in the products with values the operator would be
off by 1e-4 in place of 4e-7 (emulated). Parts of a sum over the long side go to memory and are
added up afterwards, so that results do not depend on the order in which programs run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .kernel import COORDINATE_MAX, empty_gradients

LIMIT = tl.constexpr(COORDINATE_MAX)
LOG2E = tl.constexpr(1.4426950408889634)
OTHERS = 32  # points of the other side at a time: with more, registers spill
UNITS = ("DIVIDE_U", "DIVIDE_Z", "MULTIPLY_POINTS", "MULTIPLY_VALUES")


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _rows(pointer, first, count, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr, WIDTH):
    """``N`` rows from ``first`` as float32, 0 beyond ``count``; and which of their elements are."""
    row, column = tl.arange(0, N), tl.arange(0, D)
    inside = ((row < count - first)[:, None]) & ((column < WIDTH)[None, :])
    pointer += (first + tl.full((), 0, tl.int64)) * stride_n
    offsets = row[:, None] * stride_n + column[None, :] * stride_d
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _points(
    pointer, first, count, stride_n, stride_d, centre, N: tl.constexpr, D: tl.constexpr, WIDTH
):
    """Points relative to the centre, and half their squared norms."""
    points, inside = _rows(pointer, first, count, stride_n, stride_d, N, D, WIDTH)
    points = tl.clamp(points, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    points = tl.where(inside, points - centre[None, :], 0.0)
    return points, 0.5 * tl.sum(points * points, 1)


@triton.jit
def _kernel(x, half_x, y, half_y):
    exponent = _dot(x, tl.trans(y)) - (half_x[:, None] + half_y[None, :])
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E)


@triton.jit
def _store(
    pointer, values, first, count, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr, WIDTH
):
    row, column = tl.arange(0, N), tl.arange(0, D)
    inside = ((row < count - first)[:, None]) & ((column < WIDTH)[None, :])
    pointer += (first + tl.full((), 0, tl.int64)) * stride_n
    tl.store(pointer + row[:, None] * stride_n + column[None, :] * stride_d, values, mask=inside)


@triton.jit
def centre_kernel(
    y, out, m, heads, y_b, y_h, y_n, y_d, WIDTH,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """:func:`mmsoft.ops.gaussian.kernel.centre` of ``y``: ``out [B * heads, WIDTH]``."""
    head = tl.program_id(0)
    y += (head // heads).to(tl.int64) * y_b + (head % heads).to(tl.int64) * y_h
    zero = tl.zeros([D], tl.float32)
    smallest = tl.full([N], float("inf"), tl.float32)
    for first in range(0, m, N):
        points, half = _points(y, first, m, y_n, y_d, zero, N, D, WIDTH)
        inside = tl.arange(0, N) < m - first
        smallest = tl.minimum(smallest, tl.where(inside, 2 * half, float("inf")))
    bound = 16 * tl.min(smallest, 0)
    total, count = zero, tl.zeros([N], tl.float32)
    for first in range(0, m, N):
        points, half = _points(y, first, m, y_n, y_d, zero, N, D, WIDTH)
        near = (2 * half <= bound) & (tl.arange(0, N) < m - first)
        total += tl.sum(tl.where(near[:, None], points, 0.0), 0)
        count += near.to(tl.float32)
    column = tl.arange(0, D)
    tl.store(out + head * WIDTH + column, total / tl.sum(count, 0), mask=column < WIDTH)


@triton.jit
def walk_kernel(
    x, y, u, z, centre, unit, d_points, d_values,
    n, m, rows, blocks, heads,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, u_b, u_h, u_n, u_d, z_b, z_h, z_n, z_d,
    points_s, points_b, points_h, points_n, values_s, values_b, values_h, values_n,
    D_IN, D_OUT,
    POINTS: tl.constexpr, VALUES: tl.constexpr,
    DIVIDE_U: tl.constexpr, DIVIDE_Z: tl.constexpr,
    MULTIPLY_POINTS: tl.constexpr, MULTIPLY_VALUES: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """``N`` points ``x`` for each program, which walks ``rows`` points ``y`` for each split.

    ``K z`` if ``VALUES``; if ``POINTS`` the gradient of ``x``, ``W y - (W 1) x`` with
    ``W = K * (u z^T)``.
    """
    head, split = tl.program_id(0) // blocks, tl.program_id(1)
    i = (tl.program_id(0) % blocks) * N
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    column = tl.arange(0, D)
    middle = tl.load(centre + head * D_IN + column, mask=column < D_IN, other=0.0)
    points, half = _points(x + b * x_b + h * x_h, i, n, x_n, x_d, middle, N, D, D_IN)
    if POINTS:
        ours, _inside = _rows(u + b * u_b + h * u_h, i, n, u_n, u_d, N, W, D_OUT)
        if DIVIDE_U:
            ours = ours / tl.load(unit + b)
    y += b * y_b + h * y_h
    z += b * z_b + h * z_h
    pulled, weights = tl.zeros([N, D], tl.float32), tl.zeros([N], tl.float32)
    total = tl.zeros([N, W], tl.float32)
    end = tl.minimum(m, (split + 1) * rows)
    for j in range(split * rows, end, M):
        others, half_others = _points(y, j, end, y_n, y_d, middle, M, D, D_IN)
        theirs, _inside_block = _rows(z, j, end, z_n, z_d, M, W, D_OUT)
        if DIVIDE_Z:
            theirs = theirs / tl.load(unit + b)
        kernel = _kernel(points, half, others, half_others)
        if VALUES:
            total += _dot(kernel, theirs)
        if POINTS:
            kernel *= _dot(ours, tl.trans(theirs))
            pulled += _dot(kernel, others)
            weights += tl.sum(kernel, 1)
    if VALUES:
        if MULTIPLY_VALUES:
            total = total * tl.load(unit + b)
        d_values += split.to(tl.int64) * values_s + b * values_b + h * values_h
        _store(d_values, total, i, n, values_n, 1, N, W, D_OUT)
    if POINTS:
        pulled -= weights[:, None] * points
        if MULTIPLY_POINTS:
            pulled = pulled * tl.load(unit + b)
        d_points += split.to(tl.int64) * points_s + b * points_b + h * points_h
        _store(d_points, pulled, i, n, points_n, 1, N, D, D_IN)


def _block(size: int) -> int:
    """The power of 2 that holds ``size``, 16 at least, which tensor cores need."""
    return max(16, triton.next_power_of_2(size))


def _parts(like: Tensor, width: int, count: int) -> Tensor:
    """``[count, B, heads, n, width]`` in the memory of tokens, for the parts of a sum."""
    batch, heads, n, _ = like.shape
    empty = like.new_empty((count, batch, n, heads, width), dtype=torch.float32)
    return empty.transpose(2, 3)


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, the others in the memory of tokens; of none, nothing."""
    if len(parts) < 2:
        return parts[0] if len(parts) else parts.new_empty((0, 0, 0, 0))
    return parts.transpose(2, 3).sum(0).transpose(1, 2)


def _centre(y: Tensor) -> Tensor:
    batch, heads, m, d = y.shape
    out = y.new_empty((batch * heads, d), dtype=torch.float32)
    centre_kernel[(batch * heads,)](
        y, out, m, heads, *y.stride(), d, N=min(128, _block(m)), D=_block(d)
    )
    return out


def _walk(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    z: Tensor,
    centre: Tensor,
    unit: Tensor | None,
    points: bool,
    values: bool,
    **units: bool,
) -> tuple[Tensor, Tensor]:
    """What :func:`walk_kernel` computes for ``x``: the gradient of the points, ``K z``."""
    batch, heads, n, d = x.shape
    m, width = z.shape[2:]
    # With more points at a time registers spill: tests/ops/test_compiled_kernels.py.
    wide = max(d, width) > 32
    rows_of_x, rows_of_y = min(32 if wide else 64, _block(n)), min(OTHERS, _block(m))
    blocks, others = triton.cdiv(n, rows_of_x), triton.cdiv(m, rows_of_y)
    count = launch.splits(x, blocks * batch * heads, others) if n < m else 1
    rows = triton.cdiv(others, count) * rows_of_y
    count = triton.cdiv(m, rows)
    # Of registers below capability 9.0, too, where two stages of a loop take more.
    few = points and x.dtype == torch.float32 and launch.capability(x.device) < (9, 0)
    d_points, d_values = _parts(x, d, count * points), _parts(x, width, count * values)
    walk_kernel[(blocks * batch * heads, count)](
        x, y, u, z, centre, x if unit is None else unit.contiguous(), d_points, d_values,
        n, m, rows, blocks, heads,
        *x.stride(), *y.stride(), *u.stride(), *z.stride(),
        *d_points.stride()[:4], *d_values.stride()[:4],
        d, width,
        POINTS=points, VALUES=values,
        **{name: unit is not None and units.get(name, False) for name in UNITS},
        N=rows_of_x, M=rows_of_y, D=_block(d), W=_block(width),
        num_warps=8 if wide or (points and values) else 4, num_stages=1 if few else 2,
    )  # fmt: skip
    return _sum(d_points), _sum(d_values)


def product(x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None, divide: bool) -> Tensor:
    """See :func:`mmsoft.ops.gaussian.eager.product`."""
    centre = _centre(y if x.shape[2] >= y.shape[2] else x)
    units = dict(DIVIDE_Z=divide, MULTIPLY_VALUES=not divide)
    return _walk(x, y, x, w, centre, unit, False, True, **units)[1]


def product_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    unit: Tensor | None,
    divide: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """See :func:`mmsoft.ops.gaussian.eager.product_backward`."""
    centre = _centre(y if x.shape[2] >= y.shape[2] else x)
    dx, dy, dw = empty_gradients((x, y, w), torch.float32, (False,) * 3)
    # w is in units if it is divided by them; the gradient of the queries is multiplied by them,
    # which are y then, and else x.
    if needs[0]:
        units = dict(DIVIDE_Z=divide, MULTIPLY_POINTS=not divide)
        dx, _ = _walk(x, y, grad, w, centre, unit, True, False, **units)
    if needs[1] or needs[2]:
        units = dict(DIVIDE_U=divide, MULTIPLY_POINTS=divide)
        points, values = _walk(y, x, w, grad, centre, unit, needs[1], needs[2], **units)
        dy, dw = points if needs[1] else dy, values if needs[2] else dw
    return dx, dy, dw
