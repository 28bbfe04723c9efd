"""Products with the Gaussian kernel in plain torch, streamed.

The longer of the two sides of ``K`` is walked in blocks of bounded size, forward and backward, so
that a larger ``K`` never exists as a whole. Every exponent is at most 0, so unlike softmax no
running maximum is needed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..island import compute_dtype, no_autocast
from ..mode import readable
from .kernel import COORDINATE_MAX, centre, empty_gradients, empty_like_tokens

# Elements of K alive at once, and as many of its gradient: a loop forgets its block before the next
# one is computed. On a CPU a block should stay in the cores' caches; on a GPU it should be large
# enough to fill the device.
BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_DEVICE = 1 << 25


class Stream:
    """Blocks of the kernel of a long side ``[B, h, n, d]`` and a short one ``[B, h, m, d]``.

    The exponent is one product of ``[x, 1, -|x|^2/2]`` and ``[y, -|y|^2/2, 1]``.
    """

    def __init__(self, long: Tensor, short: Tensor, dtype: torch.dtype):
        self.long = long
        short = short.to(dtype).clamp(-COORDINATE_MAX, COORDINATE_MAX)
        self.centre = centre(short)
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
        budget = BLOCK_ELEMENTS.get(self.long.device.type, _BLOCK_ELEMENTS_DEVICE)
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
                tokens.clamp_(-COORDINATE_MAX, COORDINATE_MAX).sub_(self.centre[bs])
                torch.mul(tokens.square().sum(-1), -0.5, out=augmented[..., d + 1])
                # Without a name, which would keep it while the next one is computed.
                yield bs, ns, augmented[..., : d + 1], self._kernel(augmented, bs)

    def _kernel(self, augmented: Tensor, samples: slice) -> Tensor:
        return (augmented @ self.short_augmented[samples]).clamp_(max=0).exp_()


def product(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> Tensor:
    """``K w``, see :func:`mmsoft.ops.gaussian.operators.product_in_units` for the units."""
    dtype = compute_dtype(x, y, w)
    out = empty_like_tokens(x, w.shape[-1], dtype)
    unit = _unless_one(unit)
    divisor = unit if divide else None
    with no_autocast(x):
        if x.shape[-2] >= y.shape[-2]:
            w = _in_units(w.to(dtype), divisor)
            for bs, ns, _, kernel in Stream(x, y, dtype):
                out[bs, :, ns] = kernel @ w[bs]
                del kernel
        else:
            out.zero_()
            for bs, ns, _, kernel in Stream(y, x, dtype):
                out[bs] += kernel.mT @ _in_units(w[bs, :, ns].to(dtype), divisor, bs)
                del kernel
        if unit is not None and not divide:
            out *= unit
    return out


def _in_units(w: Tensor, unit: Tensor | None, samples: slice = slice(None)) -> Tensor:
    return w if unit is None else w / unit[samples]


def _unless_one(unit: Tensor | None) -> Tensor | None:
    """``None`` for units of 1, where asking costs nothing: it is what they usually are."""
    if unit is None or not readable(unit) or (unit - 1).any():
        return unit
    return None


def product_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    unit: Tensor | None,
    divide: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``dx = W y - (W 1) x``, ``dy = W^T x - (W^T 1) y``, ``dw = K^T g``, ``W = K * (g w^T)``.

    In ``W`` ``w`` is in units. The gradient of the tokens, ``y`` if ``divide`` else ``x``, is
    multiplied by the unit; that of the landmarks is not. Of ``dx, dy, dw`` those that are not
    needed are of size 0.
    """
    dtype = compute_dtype(x, y, w)
    dx, dy, dw = empty_gradients((x, y, w), dtype, needs)
    unit = _unless_one(unit)
    divisor = unit if divide else None
    with no_autocast(x):
        # grad belongs to x's side and w to y's; the product grad w^T pairs the two.
        if x.shape[-2] >= y.shape[-2]:
            w = _in_units(w.to(dtype), divisor)
            targets = _Targets(needs[0], needs[1], False, needs[2])
            _stream_backward(Stream(x, y, dtype), grad, w, targets, dx, dy, dw, dw)
        else:
            targets = _Targets(needs[1], needs[0], needs[2], False)
            _stream_backward(Stream(y, x, dtype), w, grad, targets, dy, dx, dw, dw, divisor)
        if unit is not None and needs[1 if divide else 0]:
            tokens = dy if divide else dx
            tokens *= unit
    return dx, dy, dw


class _Targets(NamedTuple):
    """Which gradients are asked for."""

    long: bool
    short: bool
    long_w: bool
    short_w: bool


def _stream_backward(
    stream: Stream,
    long_w: Tensor,
    short_w: Tensor,
    wanted: _Targets,
    d_long: Tensor,
    d_short: Tensor,
    d_long_w: Tensor,
    d_short_w: Tensor,
    long_unit: Tensor | None = None,
) -> None:
    dtype = stream.short.dtype
    d = stream.short.shape[-1]
    short_w = short_w.to(dtype)
    short_with_one = torch.cat((stream.short, stream.one), -1)
    pulled = torch.zeros_like(short_with_one)  # W^T [x, 1]
    if wanted.short_w:
        d_short_w.zero_()
    for bs, ns, tokens, kernel in stream:
        block_w = long_w[bs, :, ns].to(dtype)
        if wanted.long_w:
            d_long_w[bs, :, ns] = kernel @ short_w[bs]
        if wanted.short_w:
            d_short_w[bs] += kernel.mT @ block_w
        if wanted.long or wanted.short:
            block_w = _in_units(block_w, long_unit, bs)
            weight = (block_w @ short_w[bs].mT).mul_(kernel)
            if wanted.long:
                push = weight @ short_with_one[bs]
                push = torch.addcmul(push[..., :d], push[..., d:], tokens[..., :d], value=-1)
                d_long[bs, :, ns] = push
            if wanted.short:
                pulled[bs] += weight.mT @ tokens
            del weight
    if wanted.short:
        d_short.copy_(torch.addcmul(pulled[..., :d], pulled[..., d:], stream.short, value=-1))
