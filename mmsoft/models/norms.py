"""The norms of the patch embeddings, and how weights choose between them."""

import math
from typing import Any, NamedTuple

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsoft.ops.group_norm import bands, group_norm, group_norm_relu_
from mmsoft.ops.island import compute_dtype, recorded_matmul
from mmsoft.ops.mode import cpu_shortcut, is_ordinary, recorded, transformed

from .padding import Inside


class ImageNorm(nn.GroupNorm):
    """GroupNorm of images ``[B, C, H, W]`` that leaves padding out.

    Unlike BatchNorm it is one function in training and evaluation, of each image alone.
    """

    def forward(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """The same shape: normalized by what is ``inside`` on the grid of ``x``, 0 elsewhere."""
        if cpu_shortcut(x, backward=True) and is_ordinary(x) and not transformed():
            return group_norm(*self._arguments(x, inside))
        if inside is None:  # not in channels-last memory, where torch's own loses digits on a CPU
            return torch.group_norm(
                x.contiguous(), self.num_groups, self.weight, self.bias, self.eps
            )
        return self._by_formula(x, inside)

    def relu_(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """ReLU of the same, in the memory of ``x``, which is on a CPU, without a backward pass."""
        return group_norm_relu_(*self._arguments(x, inside))

    def _arguments(self, x: Tensor, inside: Inside | None) -> tuple[Any, ...]:
        sizes = None
        if inside is not None:
            rows, cols = (along.sum(1).tolist() for along in inside)
            sizes = list(zip(rows, cols))
        return x, self.num_groups, self.weight, self.bias, self.eps, sizes

    def _by_formula(self, x: Tensor, inside: Inside) -> Tensor:
        """Where no size may be looked at."""
        image = x.to(compute_dtype(x)).unflatten(1, (self.num_groups, -1))
        numbers = image.shape[2] * inside.count()[:, None, None, None, None]
        outside = inside.outside()[:, None, None]
        there = inside.numbers(image.dtype).view(outside.shape)
        if recorded(x):  # in one pass, and what lies outside is finite
            total = recorded_matmul(image.flatten(3).flatten(1, 2), there.flatten(1)[..., None])
            total = total.unflatten(1, image.shape[1:3]).sum(2, keepdim=True)[..., None]
            centred = (image - total / numbers).masked_fill(outside, 0)
        else:
            image = image.masked_fill(outside, 0)
            mean = image.sum((2, 3, 4), keepdim=True) / numbers
            centred = torch.addcmul(image, mean, there, value=-1)  # one pass less
        # A product: ONNX has no square, and a power costs more.
        variance = (centred * centred).sum((2, 3, 4), keepdim=True) / numbers
        scale = (variance + self.eps).rsqrt()
        if self.affine:  # on numbers, not on pixels: less is kept for the backward pass
            scale = scale * self.weight.view(self.num_groups, -1, 1, 1)
        image = (centred * scale).flatten(1, 2)
        if self.affine and recorded(x):
            image = (image + self.bias[:, None, None]).masked_fill(outside[:, 0], 0)
        elif self.affine:
            image = torch.addcmul(image, self.bias[:, None, None], there[:, 0])
        return image.to(x.dtype)


class PixelNorm(nn.LayerNorm):
    """LayerNorm of the channels of each pixel of images ``[B, C, H, W]``, 0 in the padding.

    It depends neither on the batch nor on how an image is composed.
    """

    def forward(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """The same shape, in channels-last memory: 0 beyond what is ``inside``."""
        out = super().forward(x.permute(0, 2, 3, 1)).to(x.dtype).permute(0, 3, 1, 2)
        return out if inside is None else out.masked_fill(inside.outside()[:, None], 0)

    def relu_(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """ReLU of the same, in the memory of ``x``, which is on a CPU, without a backward pass."""
        for image in x:
            for band in bands(image.permute(1, 2, 0)):
                band.copy_(super().forward(band)).relu_()
        return x if inside is None else x.masked_fill_(inside.outside()[:, None], 0)


OURS = (ImageNorm, PixelNorm)  # which take what is inside


def build_norm(norm_cfg: Any, channels: int, of_image: bool = False) -> nn.Module:
    """The norm of a config, GroupNorm as :class:`ImageNorm`, LayerNorm as :class:`PixelNorm`.

    Args:
        norm_cfg: as of mmcv's ``build_norm_layer``; ``None`` for the default.
        channels: of the images.
        of_image: whether the default is one of the image, not of each pixel.

    Raises:
        ValueError: it is none, or not of images.
    """
    if norm_cfg is None and of_image:
        # Up to 16 groups of at least two channels: one pixel has a variance, too.
        return ImageNorm(max(math.gcd(32, channels) // 2, 1), channels)
    if norm_cfg is None:
        return PixelNorm(channels)
    try:
        norm = build_norm_layer(norm_cfg, channels)[1]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"norm_cfg {norm_cfg!r} gives no norm: {error}") from error
    own: nn.Module
    if type(norm) is nn.LayerNorm:
        own = PixelNorm(channels, norm.eps, norm.elementwise_affine)
    elif type(norm) is nn.GroupNorm:
        own = ImageNorm(norm.num_groups, channels, norm.eps, norm.affine)
    else:
        return norm
    for parameter, configured in zip(own.parameters(), norm.parameters()):
        parameter.requires_grad_(configured.requires_grad)
    return own


class NormKind(NamedTuple):
    """What of a norm its tensors do not tell."""

    type: str
    groups: int | None
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> "NormKind | None":
        """That of a module; ``None`` if it has no eps, and so is no norm that we know."""
        eps = getattr(norm, "eps", None)
        if not isinstance(eps, float):
            return None
        if isinstance(norm, nn.GroupNorm):
            return cls("GroupNorm", norm.num_groups, eps)
        for kind, name in ((_BatchNorm, "BatchNorm"), (PixelNorm, "LayerNorm")):
            if isinstance(norm, kind):
                return cls(name, None, eps)
        return cls(type(norm).__name__, None, eps)

    @classmethod
    def noted(cls, note: Any) -> "NormKind | None":
        """From the metadata of a state dict, where anything may stand."""
        if not isinstance(note, tuple) or len(note) != 3:
            return None
        name, groups, eps = note
        if type(name) is not str or type(eps) is not float or not 0 < eps < 1:
            return None
        grouped = type(groups) is int and groups > 0
        return cls(name, groups, eps) if grouped or groups is None else None

    def __str__(self) -> str:
        groups = "" if self.groups is None else f" of {self.groups} groups"
        return f"{self.type}{groups}"


def become(norm: Any, of_batch: bool, kind: NormKind | None = None, of_image: bool = False) -> bool:
    """Change the default norm into the one that weights were trained with, and back.

    The same object with the same parameters stays: hooks, wrappers and optimizers may know them.

    Args:
        norm: :class:`ImageNorm`, :class:`PixelNorm` or BatchNorm, else nothing happens.
        of_batch: whether the weights have statistics.
        kind: what is noted of their norm, ``None`` if nothing is.
        of_image: as for :func:`build_norm`, whose default weights without either have.

    Returns:
        Whether it computes something else now.

    Raises:
        ValueError: their norm has to be named.
    """
    if type(norm) not in (*OURS, nn.BatchNorm2d, nn.SyncBatchNorm) or norm.weight is None:
        return False
    channels = norm.weight.numel()
    others: dict[str, nn.Module] = dict(BatchNorm=nn.BatchNorm2d(channels))
    default = "BatchNorm"
    if not of_batch:
        image, pixel = (build_norm(None, channels, each) for each in (True, False))
        others = dict(GroupNorm=image, LayerNorm=pixel)
        default = "GroupNorm" if of_image else "LayerNorm"
    if kind is not None and kind.type not in others:
        without = " without statistics" if kind.type == "BatchNorm" else ""
        raise ValueError(
            f"the weights were trained with {kind}{without} in the patch embeddings; name it in "
            "the backbone's norm_cfg"
        )
    before = NormKind.of(norm)
    other = others[default if kind is None else kind.type]
    if not isinstance(norm, _BatchNorm if of_batch else type(other)):
        _become(norm, other)
    if kind is not None:
        norm.eps = kind.eps
        if kind.groups is not None and channels % kind.groups == 0:
            norm.num_groups = kind.groups
    return NormKind.of(norm) != before


def _become(norm: Any, other: Any) -> None:
    for name in type(norm).__constants__:
        vars(norm).pop(name, None)
    norm._buffers.clear()
    norm.__class__ = type(other)
    for name in type(other).__constants__:
        setattr(norm, name, getattr(other, name))
    other.to(norm.weight.device, norm.weight.dtype)
    for name, buffer in other.named_buffers():
        norm.register_buffer(name, buffer)
