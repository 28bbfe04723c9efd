"""The norms of the patch embeddings, and how weights choose between them."""

import math
from typing import Any, NamedTuple

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsoft.ops.group_norm import group_norm, group_norm_relu_
from mmsoft.ops.island import compute_dtype
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
        return self._by_formula(x, inside.outside()[:, None, None])

    def relu_(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """ReLU of the same, in the memory of ``x``, which is on a CPU, without a backward pass."""
        return group_norm_relu_(*self._arguments(x, inside))

    def _arguments(self, x: Tensor, inside: Inside | None) -> tuple[Any, ...]:
        sizes = None
        if inside is not None:
            rows, cols = (along.sum(1).tolist() for along in inside)
            sizes = list(zip(rows, cols))
        return x, self.num_groups, self.weight, self.bias, self.eps, sizes

    def _by_formula(self, x: Tensor, outside: Tensor) -> Tensor:
        """Where no size may be looked at."""
        image = x.to(compute_dtype(x)).unflatten(1, (self.num_groups, -1))
        numbers = image.shape[2] * (~outside).sum((2, 3, 4), keepdim=True)
        there = (~outside).to(image.dtype)
        if recorded(x):  # in one pass, and what lies outside is finite
            total = image.flatten(3).flatten(1, 2) @ there.flatten(1)[..., None]
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


def build_norm(norm_cfg: Any, channels: int) -> nn.Module:
    """The norm of a config, GroupNorm as :class:`ImageNorm`; of ``None`` the default.

    Raises:
        ValueError: it is none, or not of images.
    """
    if norm_cfg is None:  # up to 16 groups of at least two channels: one pixel has a variance, too
        return ImageNorm(max(math.gcd(32, channels) // 2, 1), channels)
    try:
        norm = build_norm_layer(norm_cfg, channels)[1]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"norm_cfg {norm_cfg!r} gives no norm: {error}") from error
    if type(norm) is nn.LayerNorm:
        raise ValueError(f"norm_cfg must be of a norm of images, got {norm_cfg!r}")
    if type(norm) is nn.GroupNorm:
        image_norm = ImageNorm(norm.num_groups, channels, norm.eps, norm.affine)
        for own, configured in zip(image_norm.parameters(), norm.parameters()):
            own.requires_grad_(configured.requires_grad)
        return image_norm
    return norm


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
        return cls("BatchNorm" if isinstance(norm, _BatchNorm) else type(norm).__name__, None, eps)

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


def become(norm: Any, of_batch: bool, kind: NormKind | None = None) -> bool:
    """Change the default norm into the one that weights were trained with, and back.

    The same object with the same parameters stays: hooks, wrappers and optimizers may know them.

    Args:
        norm: :class:`ImageNorm` or BatchNorm, else nothing happens.
        of_batch: whether the weights have statistics.
        kind: what is noted of their norm, ``None`` if nothing is.

    Returns:
        Whether it computes something else now.

    Raises:
        ValueError: their norm has to be named.
    """
    if type(norm) not in (ImageNorm, nn.BatchNorm2d, nn.SyncBatchNorm) or norm.weight is None:
        return False
    if kind is not None and kind.type != ("BatchNorm" if of_batch else "GroupNorm"):
        without = " without statistics" if kind.type == "BatchNorm" else ""
        raise ValueError(
            f"the weights were trained with {kind}{without} in the patch embeddings; name it in "
            "the backbone's norm_cfg"
        )
    before, channels = NormKind.of(norm), norm.weight.numel()
    if isinstance(norm, _BatchNorm) != of_batch:
        _become(norm, nn.BatchNorm2d(channels) if of_batch else build_norm(None, channels))
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
