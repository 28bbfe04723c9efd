"""Products with the Gaussian kernel matrix ``K_ij = exp(-||x_i - y_j||^2 / 2)``, streamed.

``K`` never exists as a whole: the longer of its two sides is walked in blocks of bounded size,
forward and backward. Every exponent is at most 0, so unlike softmax no running maximum is needed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .island import compute_dtype, forward_mode, matmul, no_autocast, transformed

# Elements of K alive at once. On a CPU a block should stay in the cores' caches; on a GPU it should
# be large enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_DEVICE = 1 << 25
# Sums of values within 2^-40 and 2^40, times what the inverse may amplify, are far from any limit.
_MODERATE = 40
# Coordinates are clamped here so that squares cannot overflow: the kernel of two points that far
# from the landmarks is 0 (or 1, for a pair beyond the same bound) whatever their distance.
_COORDINATE_MAX = 1e9


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The kernel matrix itself, for a short ``x`` and ``y``.

    Points are taken relative to a centre of ``y``, which the kernel does not notice but rounding
    does.

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``, same dtype.

    Returns:
        ``[..., n, m]`` in (0, 1], differentiable.
    """
    y = y.clamp(-_COORDINATE_MAX, _COORDINATE_MAX)
    centre = _centre(y)
    return _near_zero(x.clamp(-_COORDINATE_MAX, _COORDINATE_MAX) - centre, y - centre)


def _centre(y: Tensor) -> Tensor:
    """The mean of the points but outliers, of which one would take all others' digits."""
    y = y.detach()
    squared = y.square().sum(-1, keepdim=True)
    near = (squared <= 16 * squared.amin(-2, keepdim=True)).to(y.dtype)
    return (near * y).sum(-2, keepdim=True) / near.sum(-2, keepdim=True)


def _near_zero(x: Tensor, y: Tensor) -> Tensor:
    """The kernel of centred points. In place, because large fresh memory is slow."""
    half = y.square().sum(-1).mul_(0.5)
    half_x = half if x is y else x.square().sum(-1).mul_(0.5)
    # Symmetric if x is y.
    exponent = matmul(x, y.mT).sub_(half_x[..., :, None] + half[..., None, :])
    return exponent.clamp_(max=0).exp_()


def fits_one_block(x: Tensor, y: Tensor) -> bool:
    """Whether the kernel of ``x [B, h, n, d]`` and ``y [B, h, m, d]`` is no more than one block.

    False on a GPU, and wherever the answer would tie a traced program to these sizes.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
        return False
    return x[..., 0].numel() * y.shape[-2] <= _BLOCK_ELEMENTS["cpu"]


def gaussian_gram(x: Tensor) -> Tensor:
    """The kernel matrix of ``x [..., m, d]`` with itself, ``[..., m, m]``: its diagonal exactly 1.

    Rounding leaves the distance of a large point from itself positive, and without a diagonal a row
    may sum to 0.
    """
    x = x.clamp(-_COORDINATE_MAX, _COORDINATE_MAX)
    x = x - _centre(x)
    eye = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    return _near_zero(x, x).masked_fill(eye, 1)


class _Stream:
    """Blocks of the kernel of a long side ``[B, h, n, d]`` and a short one ``[B, h, m, d]``.

    The exponent is one product of ``[x, 1, -|x|^2/2]`` and ``[y, -|y|^2/2, 1]``.
    """

    def __init__(self, long: Tensor, short: Tensor, dtype: torch.dtype):
        self.long = long
        short = short.to(dtype).clamp(-_COORDINATE_MAX, _COORDINATE_MAX)
        self.centre = _centre(short)
        self.short = short - self.centre
        self.one = torch.ones_like(short[..., :1])
        half = self.short.square().sum(-1, keepdim=True).mul_(-0.5)
        self.short_augmented = torch.cat((self.short, half, self.one), -1).mT

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield batch slice, token slice, ``[x, 1]`` of centred tokens, kernel ``[b, h, n', m]``.

        The tokens are overwritten by the next block.
        """
        batch, heads, n, d = self.long.shape
        m = self.short.shape[-2]
        budget = _BLOCK_ELEMENTS.get(self.long.device.type, _BLOCK_ELEMENTS_DEVICE)
        samples = max(1, min(batch, budget // max(1, heads * m * min(n, 256))))
        rows = min(n, max(32, budget // max(1, samples * heads * m)))
        buffer = self.centre.new_empty((samples, heads, rows, d + 2))
        buffer[..., d] = 1
        for b in range(0, batch, samples):
            bs = slice(b, b + samples)
            for start in range(0, n, rows):
                ns = slice(start, start + rows)
                long = self.long[bs, :, ns]
                augmented = buffer[: long.shape[0], :, : long.shape[2]]
                tokens = augmented[..., :d].copy_(long)
                tokens.clamp_(-_COORDINATE_MAX, _COORDINATE_MAX).sub_(self.centre[bs])
                torch.mul(tokens.square().sum(-1), -0.5, out=augmented[..., d + 1])
                exponent = augmented @ self.short_augmented[bs]
                yield bs, ns, augmented[..., : d + 1], exponent.clamp_(max=0).exp_()


def _empty_like_tokens(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``[B, h, n, width]`` in memory ``[B, n, h, width]``: merging the heads is then a view."""
    batch, heads, n, _ = x.shape
    return x.new_empty((batch, n, heads, width), dtype=dtype).transpose(1, 2)


@torch.library.custom_op("mmsoft::gaussian_kernel_product", mutates_args=())
def _product(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> Tensor:
    dtype = compute_dtype(x, y, w)
    out = _empty_like_tokens(x, w.shape[-1], dtype)
    unit = _unless_one(unit)
    divisor = unit if divide else None
    with no_autocast(x):
        if x.shape[-2] >= y.shape[-2]:
            w = _in_units(w.to(dtype), divisor)
            for bs, ns, _, kernel in _Stream(x, y, dtype):
                out[bs, :, ns] = kernel @ w[bs]
        else:
            out.zero_()
            for bs, ns, _, kernel in _Stream(y, x, dtype):
                out[bs] += kernel.mT @ _in_units(w[bs, :, ns].to(dtype), divisor, bs)
        if unit is not None and not divide:
            out *= unit
    return out


def _in_units(w: Tensor, unit: Tensor | None, samples: slice = slice(None)) -> Tensor:
    return w if unit is None else w / unit[samples]


@_product.register_fake
def _(x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False) -> Tensor:
    return _empty_like_tokens(x, w.shape[-1], compute_dtype(x, y, w))


@torch.library.custom_op("mmsoft::gaussian_kernel_product_backward", mutates_args=())
def _product_backward(
    grad: Tensor, x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = W y - (W 1) x``, ``dy = W^T x - (W^T 1) y``, ``dw = K^T g``, ``W = K * (g w^T)``.

    In ``W`` ``w`` is in units. The gradient of the tokens, ``y`` if ``divide`` else ``x``, is
    multiplied by the unit; that of the landmarks is not.
    """
    dtype = compute_dtype(x, y, w)
    dx = _empty_like_tokens(x, x.shape[-1], dtype)
    dy = _empty_like_tokens(y, y.shape[-1], dtype)
    dw = _empty_like_tokens(w, w.shape[-1], dtype)
    unit = _unless_one(unit)
    divisor = unit if divide else None
    with no_autocast(x):
        # grad belongs to x's side and w to y's; the product grad w^T pairs them off.
        if x.shape[-2] >= y.shape[-2]:
            w = _in_units(w.to(dtype), divisor)
            _stream_backward(_Stream(x, y, dtype), grad, w, dx, dy, None, dw)
        else:
            _stream_backward(_Stream(y, x, dtype), w, grad, dy, dx, dw, None, divisor)
        if unit is not None:
            tokens = dy if divide else dx
            tokens *= unit
    return dx, dy, dw


def _stream_backward(
    stream: _Stream,
    long_w: Tensor,
    short_w: Tensor,
    d_long: Tensor,
    d_short: Tensor,
    d_long_w: Tensor | None,
    d_short_w: Tensor | None,
    long_unit: Tensor | None = None,
) -> None:
    dtype = stream.short.dtype
    d = stream.short.shape[-1]
    short_w = short_w.to(dtype)
    short_with_one = torch.cat((stream.short, stream.one), -1)
    pulled = torch.zeros_like(short_with_one)  # W^T [x, 1]
    if d_short_w is not None:
        d_short_w.zero_()
    for bs, ns, tokens, kernel in stream:
        block_w = long_w[bs, :, ns].to(dtype)
        if d_long_w is not None:
            d_long_w[bs, :, ns] = kernel @ short_w[bs]
        if d_short_w is not None:
            d_short_w[bs] += kernel.mT @ block_w
        block_w = _in_units(block_w, long_unit, bs)
        weight = (block_w @ short_w[bs].mT).mul_(kernel)
        push = weight @ short_with_one[bs]
        d_long[bs, :, ns] = torch.addcmul(push[..., :d], push[..., d:], tokens[..., :d], value=-1)
        pulled[bs] += weight.mT @ tokens
    d_short.copy_(torch.addcmul(pulled[..., :d], pulled[..., d:], stream.short, value=-1))


@_product_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x, y, w)
    return tuple(_empty_like_tokens(t, t.shape[-1], dtype) for t in (x, y, w))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.divide = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if forward_mode():
        raise NotImplementedError(
            "the backward pass of gaussian_kernel_product has no forward-mode derivative; compute "
            "the forward pass under forward mode too, as torch.func.jvp of torch.func.grad does"
        )
    *inputs, unit = ctx.saved_tensors
    grads = torch.ops.mmsoft.gaussian_kernel_product_backward(grad, *inputs, unit, ctx.divide)
    return *(g.to(t.dtype) for g, t in zip(grads, inputs)), None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "gaussian_kernel_product has no second derivative; differentiate "
        "mmsoft.ops.reference.softmax_free_attention instead"
    )


_product.register_autograd(_backward, setup_context=_setup_context)
_product_backward.register_autograd(_no_double_backward)


def gaussian_kernel_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """``K w`` with ``K_ij = exp(-||x_i - y_j||^2 / 2)``, never storing ``K``.

    Time is ``O(n m d)``; extra memory is one block of ``K`` whatever ``n`` and ``m``. Strided and
    expanded arguments are read in place. Under a transform of ``torch.func``, or in forward mode,
    ``K`` is stored.

    Args:
        x: ``[B, heads, n, d]``.
        y: ``[B, heads, m, d]``.
        w: ``[B, heads, m, d_w]``.

    Returns:
        ``[B, heads, n, d_w]`` in float32 (float64 if any argument is), whatever autocast says. Its
        memory runs ``[B, n, heads, d_w]``. Differentiable once in all three arguments, in forward
        mode and by ``torch.func`` as often as you like.
    """
    return product_in_units(x, y, w, None, divide=False)


def unit_of(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of 2 near the largest ``|w|`` of each sample, 1 if that is moderate: [B, 1, 1, 1]."""
    w = w.detach()
    largest = torch.maximum(w.amax((1, 2, 3)), -w.amin((1, 2, 3))).to(dtype)[:, None, None, None]
    tiny = torch.finfo(dtype).tiny
    unit = largest.clamp(2 * tiny, 0.5 / tiny).log2().floor().exp2()  # of normal reciprocal
    return torch.where((largest < 2.0**-_MODERATE) | (largest > 2.0**_MODERATE), unit, 1)


def _unless_one(unit: Tensor | None) -> Tensor | None:
    """``None`` for units of 1, where asking costs nothing: it is what they usually are."""
    if unit is None or unit.device.type != "cpu" or (unit - 1).any():
        return unit
    return None


def product_in_units(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None, *, divide: bool
) -> Tensor:
    """``K (w / unit)`` if ``divide``, else ``unit * (K w)``: nothing in between can overflow.

    ``S = K^T (v / unit)`` stands for ``unit * S``, and outside :func:`transformed` its cotangent is
    that of what it stands for: the gradient with respect to ``v`` or to the values' sums then needs
    no unit. That of anything else does, at its end: queries get it here, ``y`` if ``divide`` and
    ``x`` if not; the landmarks' is left to the caller, after all of it has been summed.

    Args:
        x: as for :func:`gaussian_kernel_product`.
        y: likewise.
        w: likewise.
        unit: from :func:`unit_of`; ``None`` for 1.
        divide: which of the two.
    """
    if not transformed():
        return torch.ops.mmsoft.gaussian_kernel_product(x, y, w, unit, divide)
    with no_autocast(x):
        dtype = compute_dtype(x, y, w)
        w = w.to(dtype)
        if unit is not None and divide:
            w = w / unit
        out = matmul(gaussian_kernel(x.to(dtype), y.to(dtype)), w)
        return out if unit is None or divide else unit * out
