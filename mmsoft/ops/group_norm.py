"""GroupNorm of images in channels-last memory on a CPU, a band of rows at a time.

torch's own adds up pixel by pixel there, in float32: of a large image it loses 3 of 7 digits, and
all of them where the mean is far above the deviation. Sums here are of a band in the island's dtype
and over bands in float64; where the mean is far above the deviation, of differences from about it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .island import compute_dtype

BAND = 1 << 17  # numbers, which stay in the caches
PIXELS = 2048  # at a time, because torch's kernel adds up one by one
FAR = 4  # deviations: a mean beyond loses digits in sums of the numbers as they are


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """As :func:`torch.nn.functional.group_norm`, of a part of each image.

    Args:
        x: ``[B, C, H, W]``, in any memory format.
        groups: of channels.
        weight: ``[C]``, with ``bias``, or ``None``.
        bias: ``[C]``, or ``None``.
        eps: added to the variance.
        sizes: rows and columns of each image, at least 1; what is beyond them is not read, and 0 in
            the result. ``None`` for all.

    Returns:
        ``[B, C, H, W]`` in channels-last memory, of the dtype of ``x``, to be differentiated once.
    """
    if weight is None or bias is None:
        weight, bias = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    whole = sizes is None
    sizes = _sizes(x) if sizes is None else sizes
    return _GroupNorm.apply(x, groups, weight, bias, eps, sizes, whole)


def group_norm_relu_(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """:func:`group_norm` and ReLU in the memory of ``x``, without a backward pass."""
    for sample, pixels in enumerate(_parts(x, _sizes(x) if sizes is None else sizes)):
        line = _line(*_moments(pixels, groups, eps), weight, bias)
        _affine(pixels, *line, pixels, relu=True)
        if sizes is not None:
            x[sample, :, sizes[sample][0] :] = 0
            x[sample, :, :, sizes[sample][1] :] = 0
    return x


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        sizes: Sequence[tuple[int, int]],
        whole: bool,
    ) -> Tensor:
        result, means, scales = _result(x, whole), [], []
        for pixels, target in zip(_parts(x, sizes), _parts(result, sizes)):
            mean, scale = _moments(pixels, groups, eps)
            _affine(pixels, *_line(mean, scale, weight, bias), target)
            means.append(mean)
            scales.append(scale)
        ctx.save_for_backward(x, weight, *means, *scales)
        ctx.groups, ctx.sizes, ctx.whole = groups, sizes, whole
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *moments = ctx.saved_tensors
        means, scales = moments[: len(x)], moments[len(x) :]
        dx, dtype = _result(x, ctx.whole), compute_dtype(x)
        of_weight, of_bias = torch.zeros(2, len(weight), dtype=torch.float64)
        parts = zip(*(_parts(t, ctx.sizes) for t in (x, grad, dx)), means, scales)
        for pixels, grads, target, *moments in parts:
            mean, scale = (_of_channels(moment, len(weight)) for moment in moments)
            slope, shift = scale.to(dtype), (-mean * scale).to(dtype)
            total, along = torch.zeros(2, len(weight), dtype=torch.float64)  # of g, and g times x^
            for band, g in zip(bands(pixels), bands(grads)):
                g = g.to(dtype)
                total += g.sum((0, 1))
                along += torch.addcmul(shift, band.to(dtype), slope).mul_(g).sum((0, 1))
            of_weight += along
            of_bias += total
            count = pixels.shape[0] * pixels.shape[1]
            common, tilt = (
                _by_group(sums * weight.double() / count, ctx.groups) for sums in (total, along)
            )
            # scale (g w - common - tilt x^), with x^ = slope x + shift
            of_x = (-scale * scale * tilt).to(dtype)
            constant = (scale * (mean * scale * tilt - common)).to(dtype)
            factor = (scale * weight.double()).to(dtype)
            for band, g, part in zip(bands(pixels), bands(grads), bands(target)):
                own = torch.addcmul(constant, band.to(dtype), of_x)
                part.copy_(own.addcmul_(g.to(dtype), factor))
        needs = ctx.needs_input_grad
        return (
            dx if needs[0] else None,
            None,
            of_weight.to(weight.dtype) if needs[2] else None,
            of_bias.to(weight.dtype) if needs[3] else None,
            *(None,) * 3,
        )


def _result(x: Tensor, whole: bool) -> Tensor:
    make = torch.empty_like if whole else torch.zeros_like
    return make(x, memory_format=torch.channels_last)


def _parts(x: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Of each image the pixels ``[h, w, C]``."""
    for image, (h, w) in zip(x, sizes):
        yield image[:, :h, :w].permute(1, 2, 0)


def bands(pixels: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``[h, w, C]`` that stay in the caches, views of it."""
    return pixels.split(max(1, BAND // max(1, pixels[0].numel())))


def _by_group(channels: Tensor, groups: int) -> Tensor:
    """Means over the channels of a group, for each of them, ``[C]``."""
    return _of_channels(channels.view(groups, -1).mean(1, keepdim=True), len(channels))


def _sizes(x: Tensor) -> list[tuple[int, int]]:
    return [(x.shape[2], x.shape[3])] * len(x)


def _moments(pixels: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of each group of channels, ``[groups, 1]`` in float64."""
    if pixels.is_contiguous() and pixels.numel() > 0:  # else torch's kernel is the slow one
        mean, variance = _plain_moments(pixels, groups)
        if bool((mean.square() <= FAR * FAR * variance).all() & variance.isfinite().all()):
            return mean, (variance + eps).rsqrt_()
    mean, variance = _careful_moments(pixels, groups)
    if not bool(variance.isfinite().all()):  # squares overflow, or a number is not finite
        mean, variance = _careful_moments(pixels.double(), groups)
    return mean, (variance + eps).rsqrt_()


def _plain_moments(pixels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """By torch's kernel for the statistics of a batch, some pixels at a time: it is faster."""
    dtype, parts = compute_dtype(pixels), pixels.flatten(0, 1).split(PIXELS)
    images = (part.to(dtype)[None, None].permute(0, 3, 1, 2) for part in parts)
    moments = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in images]
    both = torch.stack([torch.stack(pair) for pair in moments], 2).double()
    means, variances = both.unflatten(1, (groups, -1)).flatten(2)
    numbers = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    channels = means.shape[1] // len(parts)
    share = (numbers / (numbers.sum() * channels)).repeat(channels)
    mean = (means * share).sum(1, keepdim=True)
    variance = (means - mean).square_().add_(variances).mul_(share).sum(1, keepdim=True)
    return mean, variance


def _careful_moments(pixels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(pixels)
    channels = pixels.shape[2] // groups
    about = pixels[::8, ::8].to(dtype).mean((0, 1)).view(groups, -1).mean(1, keepdim=True)
    total, squares = torch.zeros(2, pixels.shape[2], dtype=torch.float64)
    for band in bands(pixels):
        away = band.to(dtype) - about.expand(-1, channels).flatten()
        total += away.sum((0, 1))
        squares += away.square_().sum((0, 1))
    count = pixels.shape[0] * pixels.shape[1]
    mean, square = (
        (sums / count).view(groups, -1).mean(1, keepdim=True) for sums in (total, squares)
    )
    return about.double() + mean, (square - mean.square()).clamp(min=0)


def _line(mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel."""
    factor = (scale * weight.double().view(len(scale), -1)).flatten()
    return factor, bias.double() - _of_channels(mean, len(bias)) * factor


def _of_channels(groups: Tensor, channels: int) -> Tensor:
    return groups.expand(-1, channels // len(groups)).flatten()


def _affine(
    pixels: Tensor, factor: Tensor, shift: Tensor, target: Tensor, relu: bool = False
) -> None:
    """``pixels * factor + shift`` into ``target``, which may be ``pixels``."""
    dtype = compute_dtype(pixels)
    factor, shift = factor.to(dtype), shift.to(dtype)
    for band, part in zip(bands(pixels), bands(target)):
        if part.dtype == dtype:
            torch.addcmul(shift, band, factor, out=part)
        else:
            part.copy_(torch.addcmul(shift, band.to(dtype), factor))
        if relu:
            part.relu_()
