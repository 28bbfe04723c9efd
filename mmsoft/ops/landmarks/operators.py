"""The custom operators: signatures, shapes and gradients, whatever computes them."""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..backends import EAGER, Implementation, Operation
from ..launch import TRITON, lazily, misfit, refusal
from ..library import custom_op
from ..mode import forward_mode, transformed
from . import choice, eager
from .grid import landmark_grid

_LAPACK = "mmsoft.ops.landmarks.lapack"
_TRITON = "mmsoft.ops.landmarks.triton"
PATCHES = Operation("landmark_patches", Implementation(EAGER, eager.gather))
BACKWARD = Operation("landmark_patches_backward", Implementation(EAGER, eager.scatter))


@cache
def _lacking() -> str | None:
    """Why LAPACK cannot be called: no SciPy, or one that does not fit this NumPy."""
    try:
        import_module(_LAPACK)
    except ImportError as error:
        return f"SciPy cannot be imported: {error}"
    return None


def _lapack_refusal(candidates: Tensor, *_: Any) -> str | None:
    if candidates.device.type != "cpu":
        return f"candidates are on {candidates.device}, not on a CPU"
    if candidates.shape[2] > choice.FEW:
        return f"there are {candidates.shape[2]} candidates, more than {choice.FEW}"
    return _lacking()


def _triton_refusal(
    candidates: Tensor, budget: int, _: float, mask: Tensor | None = None
) -> str | None:
    if candidates.dim() != 4:
        return "an argument has not 4 dimensions"
    if mask is not None and mask.dtype != torch.bool:
        return "the mask is not of bool"
    masks = [] if mask is None else [mask]
    reason = misfit(*((mask, candidates.shape[::2]) for mask in masks))
    reason = reason or refusal(candidates, *(mask[..., None] for mask in masks))
    if reason is None and min(candidates.shape[2], budget) > 128:
        return "more than 128 landmarks are to be chosen"
    if reason is None and candidates.shape[3] > 64:
        return "there are more than 64 channels"
    return reason


CHOICE = Operation(
    "landmark_choice",
    Implementation(TRITON, lazily(_TRITON, "choose"), _triton_refusal, on_request=True),
    # It factorizes whatever the budget, and has a tenth of the calls of a step by step choice.
    Implementation("lapack", lazily(_LAPACK, "choose"), _lapack_refusal),
    Implementation(EAGER, choice.choose),
)


@custom_op("mmsoft::landmark_patches")
def _patches(
    q: Tensor,
    height: int,
    width: int,
    heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    return PATCHES(q, height, width, heads, stride, max_landmarks, index)


@_patches.register_fake
def _(
    q: Tensor,
    height: int,
    width: int,
    heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    rows, cols = landmark_grid(height, width, stride, max_landmarks)
    count = rows * cols if index is None else index.shape[2]
    return q.new_empty(q.shape[0], count, heads, stride * stride, q.shape[2] // heads)


@custom_op("mmsoft::landmark_patches_backward")
def _patches_backward(
    grad: Tensor,
    height: int,
    width: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    return BACKWARD(grad, height, width, stride, max_landmarks, index)


@_patches_backward.register_fake
def _(
    grad: Tensor,
    height: int,
    width: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2] * grad.shape[4])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *ctx.arguments, index = inputs[1:]
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    height, width, _, stride, max_landmarks = ctx.arguments
    scatter = (
        eager.scatter
        if BACKWARD.gives_way(forward_mode())
        else torch.ops.mmsoft.landmark_patches_backward
    )
    tokens = scatter(grad, height, width, stride, max_landmarks, *ctx.saved_tensors)
    return tokens, None, None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = (*inputs[1:3], inputs[0].shape[2], *inputs[3:5])
    ctx.save_for_backward(inputs[5])


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gather = (
        eager.gather if PATCHES.gives_way(forward_mode()) else torch.ops.mmsoft.landmark_patches
    )
    patches = gather(grad, *ctx.arguments, *ctx.saved_tensors)
    return patches, None, None, None, None, None


_patches.register_autograd(_backward, setup_context=_context)
_patches_backward.register_autograd(_backward_backward, setup_context=_backward_context)


def patches(
    q: Tensor,
    height: int,
    width: int,
    heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None,
) -> Tensor:
    """:func:`mmsoft.ops.landmark_patches`, unchecked."""
    plain = PATCHES.gives_way(transformed()) and BACKWARD.gives_way(True)
    gather = eager.gather if plain else torch.ops.mmsoft.landmark_patches
    return gather(q, height, width, heads, stride, max_landmarks, index)


@custom_op("mmsoft::landmark_choice")
def _choice(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return CHOICE(candidates, budget, tolerance, mask)


@_choice.register_fake
def _(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (*candidates.shape[:2], torch.sym_min(candidates.shape[2], budget))
    index = candidates.new_empty(shape, dtype=torch.long)
    return index, candidates.new_empty(shape, dtype=torch.bool)


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`mmsoft.ops.choose_landmarks`, unchecked."""
    way = choice.choose if CHOICE.gives_way(transformed()) else torch.ops.mmsoft.landmark_choice
    return way(candidates.detach(), budget, tolerance, mask)
