"""The custom operators: signatures, shapes and gradients, whatever computes them."""

from typing import Any

import torch
from torch import Tensor

from ..backends import EAGER, Implementation, Operation
from ..mode import forward_mode, transformed
from . import eager
from .grid import landmark_grid

PATCHES = Operation("landmark_patches", Implementation(EAGER, eager.gather))
BACKWARD = Operation("landmark_patches_backward", Implementation(EAGER, eager.scatter))


@torch.library.custom_op("mmsoft::landmark_patches", mutates_args=())
def _patches(
    q: Tensor, height: int, width: int, heads: int, stride: int, max_landmarks: int | None
) -> Tensor:
    return PATCHES(q, height, width, heads, stride, max_landmarks)


@_patches.register_fake
def _(
    q: Tensor, height: int, width: int, heads: int, stride: int, max_landmarks: int | None
) -> Tensor:
    rows, cols = landmark_grid(height, width, stride, max_landmarks)
    return q.new_empty(q.shape[0], rows * cols, heads, stride * stride, q.shape[2] // heads)


@torch.library.custom_op("mmsoft::landmark_patches_backward", mutates_args=())
def _patches_backward(
    grad: Tensor, height: int, width: int, stride: int, max_landmarks: int | None
) -> Tensor:
    return BACKWARD(grad, height, width, stride, max_landmarks)


@_patches_backward.register_fake
def _(grad: Tensor, height: int, width: int, stride: int, max_landmarks: int | None) -> Tensor:
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2] * grad.shape[4])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    height, width, _, stride, max_landmarks = ctx.arguments
    scatter = (
        eager.scatter
        if BACKWARD.gives_way(forward_mode())
        else torch.ops.mmsoft.landmark_patches_backward
    )
    return scatter(grad, height, width, stride, max_landmarks), None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = (*inputs[1:3], inputs[0].shape[2], *inputs[3:])


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gather = (
        eager.gather if PATCHES.gives_way(forward_mode()) else torch.ops.mmsoft.landmark_patches
    )
    return gather(grad, *ctx.arguments), None, None, None, None


_patches.register_autograd(_backward, setup_context=_context)
_patches_backward.register_autograd(_backward_backward, setup_context=_backward_context)


def patches(
    q: Tensor, height: int, width: int, heads: int, stride: int, max_landmarks: int | None
) -> Tensor:
    """:func:`mmsoft.ops.landmark_patches`, unchecked."""
    plain = PATCHES.gives_way(transformed()) and BACKWARD.gives_way(True)
    gather = eager.gather if plain else torch.ops.mmsoft.landmark_patches
    return gather(q, height, width, heads, stride, max_landmarks)
