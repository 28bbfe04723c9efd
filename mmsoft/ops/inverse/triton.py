"""Both inverses in Triton, one program for each matrix: a launch in place of one for each step.

A backward pass takes a program for every few rows of a matrix, which need nothing of each other. Up
to 64 landmarks all iterates of Newton-Raphson stay in registers; up to 128 they go tile by tile
through memory of the program's own, which the caches hold: more in registers would spill. The
regularized solve eliminates in registers up to 128. Products are of three TF32 parts, as in
``gaussian/triton.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager

HALVINGS = tl.constexpr(eager.HALVINGS)
GUARD = tl.constexpr(eager.GUARD)
ROWS = 16  # of a gradient for each program: with more, registers spill


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _tile(pointer, i, j, m, width, stride_n, stride_d, N: tl.constexpr, M: tl.constexpr):
    """The tile ``[N, M]`` at ``(i, j)`` of a matrix ``[m, width]``, 0 beyond it."""
    row, column = i + tl.arange(0, N), j + tl.arange(0, M)
    inside = ((row < m)[:, None]) & ((column < width)[None, :])
    offsets = row[:, None] * stride_n + column[None, :] * stride_d
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _guarded(a, m, heads, a_h, a_n, a_d, T: tl.constexpr):
    """``alpha`` and ``cubic`` of the sample at ``a``: both maxima run over its heads."""
    rows: tl.constexpr = T if T <= 64 else 16  # at a time: with more of 128, registers spill
    most = tl.zeros([rows], tl.float32)
    for head in range(0, heads):
        of_head = a + (head + tl.full((), 0, tl.int64)) * a_h
        for i in range(0, T, rows):
            most = _larger(most, tl.sum(_tile(of_head, i, 0, m, m, a_n, a_d, rows, T), 1))
    largest = tl.reduce(most, 0, _larger)
    start = 2.0 / (largest * largest)
    number = tl.arange(0, 16)
    candidates = (start * tl.exp2(-number.to(tl.float32)))[None, :]
    above = tl.zeros([16], tl.int32)
    for head in range(0, heads):
        of_head = a + (head + tl.full((), 0, tl.int64)) * a_h
        sums = tl.zeros([T], tl.float32)
        for i in range(0, T, rows):
            sums += tl.sum(_tile(of_head, i, 0, m, m, a_n, a_d, rows, T), 0)
        for i in range(0, T, rows):
            tile = _tile(of_head, i, 0, m, m, a_n, a_d, rows, T)
            diagonal = tl.sum(tile * tile, 1)[:, None]
            columns = tl.sum(tile * sums[None, :], 1)[:, None]
            norm = tl.abs(1.0 - candidates * diagonal) + candidates * (columns - diagonal)
            # Rows that are not there have a norm of 1. A NaN is accepted, as plain torch does.
            above = tl.maximum(above, tl.max((norm > GUARD).to(tl.int32), 0))
    accepted = (above == 0) | (number >= HALVINGS)
    rejected = tl.min(tl.where(accepted, number, 16), 0)
    alpha = start * tl.exp2(-rejected.to(tl.float32))
    return alpha, tl.where(rejected == 0, alpha * alpha / 4, 0.0)


@triton.jit
def _start(
    a, alpha, cubic, m, b, h, heads, a_h, a_n, a_d, alpha_b, alpha_h, cubic_b, cubic_h,
    GUARDED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """``alpha`` and ``cubic`` of one matrix, found if it is ``GUARDED``, else read."""
    if GUARDED:
        first, third = _guarded(a, m, heads, a_h, a_n, a_d, T)
    else:
        first = tl.load(alpha + b * alpha_b + h * alpha_h)
        third = tl.load(cubic + b * cubic_b + h * cubic_h)
    return first, third


@triton.jit
def newton_kernel(
    a, alpha, cubic, out, m, heads, steps,
    a_b, a_h, a_n, a_d, alpha_b, alpha_h, cubic_b, cubic_h,
    GUARDED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The step size, if it is ``GUARDED``, and all steps for one matrix that fits in registers."""
    matrix = tl.program_id(0)
    b, h = (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64)
    a += b * a_b
    first, third = _start(
        a, alpha, cubic, m, b, h, heads, a_h, a_n, a_d, alpha_b, alpha_h, cubic_b, cubic_h,
        GUARDED, T,
    )  # fmt: skip
    tile = _tile(a + h * a_h, 0, 0, m, m, a_n, a_d, T, T)
    x = tile
    for step in range(0, steps + 1):  # the start is a step from A with other factors
        # The order that takes fewer registers.
        product = _dot(_dot(x, tile), x) if T > 32 else _dot(x, _dot(tile, x))
        x = tl.where(step == 0, first, 2.0) * x - tl.where(step == 0, third, 1.0) * product
    row, column = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    out += matrix.to(tl.int64) * m * m
    tl.store(out + row * m + column, x, mask=(row < m) & (column < m))


@triton.jit
def _product_tile(x, y, i, j, T: tl.constexpr, P: tl.constexpr):
    """The tile at ``(i, j)`` of the product of two matrices ``[P, P]``."""
    total = tl.zeros([T, T], tl.float32)
    for k in range(0, P, T):
        total += _dot(_tile(x, i, k, P, P, P, 1, T, T), _tile(y, k, j, P, P, P, 1, T, T))
    return total


@triton.jit
def _put(pointer, i, j, values, T: tl.constexpr, P: tl.constexpr):
    row, column = i + tl.arange(0, T), j + tl.arange(0, T)
    tl.store(pointer + row[:, None] * P + column[None, :], values)


@triton.jit
def newton_tiles_kernel(
    a, alpha, cubic, out, scratch, m, heads, steps,
    a_b, a_h, a_n, a_d, alpha_b, alpha_h, cubic_b, cubic_h,
    GUARDED: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The same for one matrix in tiles; ``scratch`` has room for four matrices ``[P, P]``."""
    matrix = tl.program_id(0)
    b, h = (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64)
    a += b * a_b
    first, third = _start(
        a, alpha, cubic, m, b, h, heads, a_h, a_n, a_d, alpha_b, alpha_h, cubic_b, cubic_h,
        GUARDED, P,
    )  # fmt: skip
    a += h * a_h
    size: tl.constexpr = P * P
    full = scratch + matrix.to(tl.int64) * 4 * size
    between, start = full + size, full + 2 * size
    for i in range(0, P, T):
        for j in range(0, P, T):
            tile = _tile(a, i, j, m, m, a_n, a_d, T, T)
            _put(full, i, j, tile, T, P)
            _put(start, i, j, tile, T, P)
    tl.debug_barrier()
    old, new = start, start + size
    for step in range(0, steps + 1):
        linear, cube = tl.where(step == 0, first, 2.0), tl.where(step == 0, third, 1.0)
        for i in range(0, P, T):
            for j in range(0, P, T):
                _put(between, i, j, _product_tile(full, old, i, j, T, P), T, P)
        tl.debug_barrier()
        for i in range(0, P, T):
            for j in range(0, P, T):
                product = _product_tile(old, between, i, j, T, P)
                x = linear * _tile(old, i, j, P, P, P, 1, T, T) - cube * product
                _put(new, i, j, x, T, P)
        tl.debug_barrier()
        old, new = new, old
    out += matrix.to(tl.int64) * m * m
    for i in range(0, P, T):
        for j in range(0, P, T):
            row, column = (i + tl.arange(0, T))[:, None], (j + tl.arange(0, T))[None, :]
            inside = (row < m) & (column < m)
            tl.store(out + row * m + column, _tile(old, i, j, P, P, P, 1, T, T), mask=inside)


@triton.jit
def solve_kernel(
    a, mu, right, out, m, width, heads,
    a_b, a_h, a_n, a_d, mu_b, mu_h, right_b, right_h, right_n, right_d,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``(A^2 + mu^2 I)^-1 b``, ``W`` columns for each program, by elimination in registers, which
    a positive matrix lets pivot down its diagonal; NaN for any other, as a Cholesky factorization.
    """  # noqa: D205
    matrix = tl.program_id(0)
    b, h = (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64)
    a += b * a_b + h * a_h
    row, column = tl.arange(0, T), tl.arange(0, T)
    normal = tl.zeros([T, T], tl.float32)
    for k in range(0, T, K):
        normal += _dot(_tile(a, 0, k, m, m, a_n, a_d, T, K), _tile(a, k, 0, m, m, a_n, a_d, K, T))
    damping = tl.load(mu + b * mu_b + h * mu_h)
    diagonal = row[:, None] == column[None, :]
    normal += tl.where(diagonal, tl.where(row < m, damping * damping, 1.0)[:, None], 0.0)
    right += b * right_b + h * right_h
    x = _tile(right, 0, tl.program_id(1) * W, m, width, right_n, right_d, T, W)
    for j in range(0, m):
        at_row = (row == j)[:, None]
        line = tl.sum(tl.where(at_row, normal, 0.0), 0)
        pivot = tl.sum(tl.where(column == j, line, 0.0), 0)
        below = tl.sum(tl.where((column == j)[None, :], normal, 0.0), 1)
        factor = tl.where(row > j, below / pivot, 0.0)[:, None]
        normal -= factor * line[None, :]
        x -= factor * tl.sum(tl.where(at_row, x, 0.0), 0)[None, :]
    for j in range(m - 1, -1, -1):
        above = tl.sum(tl.where((column == j)[None, :], normal, 0.0), 1)
        at_row = (row == j)[:, None]
        pivot = tl.sum(tl.where(row == j, above, 0.0), 0)
        known = tl.sum(tl.where(at_row, x, 0.0), 0) / tl.where(pivot > 0, pivot, float("nan"))
        x = tl.where(
            at_row, known[None, :], x - tl.where(row < j, above, 0.0)[:, None] * known[None, :]
        )
    channel = tl.program_id(1) * W + tl.arange(0, W)
    inside = ((row < m)[:, None]) & ((channel < width)[None, :])
    out += matrix.to(tl.int64) * m * width
    tl.store(out + row[:, None] * width + channel[None, :], x, mask=inside)


@triton.jit
def newton_backward_kernel(
    x, grad, out, m, heads, x_b, x_h, x_n, x_d, grad_b, grad_h, grad_n, grad_d,
    R: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """``-X^T G X^T``, ``R`` rows of one matrix for each program."""
    matrix, i = tl.program_id(0), tl.program_id(1) * R
    b, h = (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64)
    x += b * x_b + h * x_h
    grad += b * grad_b + h * grad_h
    rows = tl.zeros([R, T], tl.float32)
    for k in range(0, m, K):
        theirs = _tile(grad, k, 0, m, m, grad_n, grad_d, K, T)
        rows += _dot(_tile(x, i, k, m, m, x_d, x_n, R, K), theirs)
    out += matrix.to(tl.int64) * m * m
    row = (i + tl.arange(0, R))[:, None]
    for j in range(0, m, K):
        column = (j + tl.arange(0, K))[None, :]
        product = _dot(rows, _tile(x, 0, j, m, m, x_d, x_n, T, K))
        tl.store(out + row * m + column, -product, mask=(row < m) & (column < m))


@triton.jit
def solve_backward_kernel(
    a, x, y, out, m, width, heads,
    a_b, a_h, a_n, a_d, x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d,
    R: tl.constexpr, K: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """``-(Y X^T A^T + A Y X^T)``, ``R`` rows of one matrix for each program."""
    matrix, i = tl.program_id(0), tl.program_id(1) * R
    b, h = (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64)
    a += b * a_b + h * a_h
    x += b * x_b + h * x_h
    y += b * y_b + h * y_h
    ours = _tile(y, i, 0, m, width, y_n, y_d, R, W)
    rows, total = tl.zeros([R, W], tl.float32), tl.zeros([R, T], tl.float32)
    for k in range(0, m, K):
        theirs = _tile(y, k, 0, m, width, y_n, y_d, K, W)
        rows += _dot(_tile(a, i, k, m, m, a_n, a_d, R, K), theirs)
        product = _dot(ours, _tile(x, 0, k, width, m, x_d, x_n, W, K))
        total += _dot(product, _tile(a, k, 0, m, m, a_d, a_n, K, T))
    total += _dot(rows, _tile(x, 0, 0, width, m, x_d, x_n, W, T))
    out += matrix.to(tl.int64) * m * m
    row, column = (i + tl.arange(0, R))[:, None], tl.arange(0, T)[None, :]
    tl.store(out + row * m + column, -total, mask=(row < m) & (column < m))


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    """See :func:`mmsoft.ops.inverse.eager.newton`."""
    batch, heads, m, _ = a.shape
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    guarded = alpha is None or cubic is None
    if alpha is None or cubic is None:
        alpha = cubic = a[:, :, :1, :1]  # not looked at
    alpha, cubic = (t.expand(batch, heads, 1, 1) for t in (alpha, cubic))
    strides = (*a.stride(), *alpha.stride()[:2], *cubic.stride()[:2])
    if m <= 64:
        newton_kernel[(batch * heads,)](
            a, alpha, cubic, out, m, heads, steps, *strides,
            GUARDED=guarded, T=_block(m), num_warps=4, num_stages=1,
        )  # fmt: skip
        return out
    scratch = a.new_empty((batch * heads, 4, 128, 128))
    newton_tiles_kernel[(batch * heads,)](
        a, alpha, cubic, out, scratch, m, heads, steps, *strides,
        GUARDED=guarded, T=32, P=128, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def solve(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    """See :func:`mmsoft.ops.inverse.eager.solve`."""
    batch, heads, m, width = b.shape
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    mu = mu.expand(batch, heads, 1, 1)
    # With more columns for each program registers spill.
    columns = min(_block(width), 32 if m > 64 else 64)
    solve_kernel[(batch * heads, triton.cdiv(width, columns))](
        a, mu, b, out, m, width, heads, *a.stride(), *mu.stride()[:2], *b.stride(),
        T=_block(m), W=columns, K=16, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def newton_backward(x: Tensor, grad: Tensor) -> Tensor:
    """See :func:`mmsoft.ops.inverse.eager.newton_backward`."""
    batch, heads, m, _ = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    newton_backward_kernel[(batch * heads, triton.cdiv(m, ROWS))](
        x, grad, out, m, heads, *x.stride(), *grad.stride(),
        R=ROWS, K=min(32, _block(m)), T=_block(m), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def solve_backward(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """See :func:`mmsoft.ops.inverse.eager.solve_backward`."""
    batch, heads, m, width = x.shape
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    solve_backward_kernel[(batch * heads, triton.cdiv(m, ROWS))](
        a, x, y, out, m, width, heads, *a.stride(), *x.stride(), *y.stride(),
        R=ROWS, K=16, T=_block(m), W=_block(width), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
