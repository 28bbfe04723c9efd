"""Where landmarks are sampled: disjoint patches of the token grid, at most so many of them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .island import forward_mode, transformed


def landmark_grid(
    height: int, width: int, stride: int, max_landmarks: int | None = None
) -> tuple[int, int]:
    """Rows and columns of landmarks on a grid of tokens.

    Args:
        height: rows of tokens.
        width: columns of tokens.
        stride: tokens per landmark along each axis. A remainder is cut off, as by a convolution
            without padding; there is at least one landmark.
        max_landmarks: the budget, or ``None``. A larger grid shrinks along its longer axis first,
            to a square at the most: every image then uses nearly the whole budget, and the numbers
            stay expressions of the size that ``torch.compile`` and ``torch.export`` understand.
    """
    rows = torch.sym_max(height // stride, 1)
    cols = torch.sym_max(width // stride, 1)
    if max_landmarks is not None:
        kept_rows = torch.sym_min(rows, math.isqrt(max_landmarks))
        cols = torch.sym_min(cols, max_landmarks // kept_rows)
        rows = torch.sym_min(rows, max_landmarks // cols)
    return rows, cols


def _spread(size: int, kept: int, device: torch.device) -> Tensor:
    """``kept`` of ``size`` indices, at the centres of as many equal intervals."""
    return (2 * torch.arange(kept, device=device) + 1) * size // (2 * kept)


def landmark_centres(
    height: int, width: int, stride: int, max_landmarks: int | None = None
) -> Tensor:
    """Where landmarks lie on a grid of tokens; the arguments are those of :func:`landmark_grid`.

    Returns:
        ``[m, 2]``: row and column of the centre of each landmark's patch, where token (i, j) has
        its centre at (i, j). Float64.
    """
    grid = landmark_grid(height, width, stride)
    kept = landmark_grid(height, width, stride, max_landmarks)
    device = torch.device("cpu")
    rows, cols = (_spread(n, k, device) * stride + (stride - 1) / 2 for n, k in zip(grid, kept))
    return torch.cartesian_prod(rows.double(), cols.double()).view(-1, 2)


def _select(
    image: Tensor, stride: int, max_landmarks: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[int, int]]:
    """Patches ``[B, rows, r, cols, r, heads, d]`` (a view), those kept, and how many."""
    height, width = image.shape[1:3]
    rows, cols = landmark_grid(height, width, stride)
    patches = image[:, : rows * stride, : cols * stride]
    patches = patches.unflatten(2, (cols, stride)).unflatten(1, (rows, stride))
    kept = landmark_grid(height, width, stride, max_landmarks)
    if kept == (rows, cols):
        return patches, None, kept
    index = _spread(rows, kept[0], image.device), _spread(cols, kept[1], image.device)
    return patches, index, kept


def _gather(
    q: Tensor, height: int, width: int, heads: int, stride: int, max_landmarks: int | None
) -> Tensor:
    image = q.reshape(q.shape[0], height, width, heads, q.shape[2] // heads)
    if height < stride or width < stride:
        down, right = max(stride - height, 0), max(stride - width, 0)
        image = F.pad(image, (0, 0, 0, 0, 0, right, 0, down))
    patches, index, (rows, cols) = _select(image, stride, max_landmarks)
    if index is not None:
        patches = patches[:, index[0]][:, :, :, index[1]]
    blocks = patches.permute(0, 1, 3, 5, 2, 4, 6).clone(memory_format=torch.contiguous_format)
    return blocks.view(q.shape[0], rows * cols, heads, stride * stride, image.shape[-1])


_patches = torch.library.custom_op("mmsoft::landmark_patches", _gather, mutates_args=())


@_patches.register_fake
def _(
    q: Tensor, height: int, width: int, heads: int, stride: int, max_landmarks: int | None
) -> Tensor:
    rows, cols = landmark_grid(height, width, stride, max_landmarks)
    return q.new_empty(q.shape[0], rows * cols, heads, stride * stride, q.shape[2] // heads)


def _scatter(
    grad: Tensor, height: int, width: int, stride: int, max_landmarks: int | None
) -> Tensor:
    batch, _, heads, _, d = grad.shape
    image = grad.new_zeros(batch, max(height, stride), max(width, stride), heads, d)
    patches, index, kept = _select(image, stride, max_landmarks)
    grad = grad.reshape(batch, *kept, heads, stride, stride, d).permute(0, 1, 4, 2, 5, 3, 6)
    if index is None:
        patches.copy_(grad)
    else:  # indices around a slice move to the front
        patches[:, index[0][:, None], :, index[1]] = grad.permute(1, 3, 0, 2, 4, 5, 6)
    return image[:, :height, :width].reshape(batch, height * width, heads * d).clone()


_patches_backward = torch.library.custom_op(
    "mmsoft::landmark_patches_backward", _scatter, mutates_args=()
)


@_patches_backward.register_fake
def _(grad: Tensor, height: int, width: int, stride: int, max_landmarks: int | None) -> Tensor:
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2] * grad.shape[4])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    height, width, _, stride, max_landmarks = ctx.arguments
    scatter = _scatter if forward_mode() else torch.ops.mmsoft.landmark_patches_backward
    return scatter(grad, height, width, stride, max_landmarks), None, None, None, None, None


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = (*inputs[1:3], inputs[0].shape[2], *inputs[3:])


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gather = _gather if forward_mode() else torch.ops.mmsoft.landmark_patches
    return gather(grad, *ctx.arguments), None, None, None, None


_patches.register_autograd(_backward, setup_context=_context)
_patches_backward.register_autograd(_backward_backward, setup_context=_backward_context)


def landmark_patches(
    q: Tensor,
    hw_shape: tuple[int, int],
    num_heads: int,
    stride: int,
    max_landmarks: int | None = None,
) -> Tensor:
    """The patches of tokens that landmarks are made from, head by head.

    A convolution whose stride is its kernel is a product with such patches. With a budget that is
    exceeded, patches at even distances are taken; those between are not looked at. An image
    smaller than one patch is padded with zeros.

    Args:
        q: ``[B, H*W, C]``, row by row.
        hw_shape: ``(H, W)``.
        num_heads: heads ``h``; d = C / h channels each.
        stride: side ``r`` of a patch.
        max_landmarks: at most this many patches; ``None`` for all.

    Returns:
        ``[B, m, h, r*r, d]``, where ``m`` is the product of :func:`landmark_grid`.

    Raises:
        TypeError, ValueError: ``q`` does not have ``H*W`` tokens of ``h`` heads, or a number is not
            positive.
    """
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
        hw_shape = (int(hw_shape[0]), int(hw_shape[1]))
    ints = (int, torch.SymInt)
    if (
        not isinstance(hw_shape, (tuple, list))
        or len(hw_shape) != 2
        or not all(isinstance(side, ints) and side > 0 for side in hw_shape)
    ):
        raise ValueError(f"hw_shape must be two positive integers (H, W), got {hw_shape!r}")
    budget = 1 if max_landmarks is None else max_landmarks
    for name, value in (("num_heads", num_heads), ("stride", stride), ("max_landmarks", budget)):
        if not isinstance(value, ints) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if q.dim() != 3 or q.shape[1] != hw_shape[0] * hw_shape[1]:
        raise ValueError(
            f"q must be [B, H*W, C] with H*W = {hw_shape[0]}*{hw_shape[1]} tokens, "
            f"got shape {tuple(q.shape)}"
        )
    if q.shape[2] % num_heads:
        raise ValueError(f"q must have channels for {num_heads} heads, got {q.shape[2]}")
    gather = _gather if transformed() else torch.ops.mmsoft.landmark_patches
    return gather(q, *hw_shape, num_heads, stride, max_landmarks)
