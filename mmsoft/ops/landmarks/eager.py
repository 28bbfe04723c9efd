"""The patches of landmarks in plain torch, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import landmark_grid, spread


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
    index = spread(rows, kept[0], image.device), spread(cols, kept[1], image.device)
    return patches, index, kept


def _at(index: Tensor, cols: int) -> list[Tensor | None]:
    """Indices of the patches ``index [B, heads, m]`` into what :func:`_select` gives."""
    batch, heads, _ = index.shape
    sample = torch.arange(batch, device=index.device)[:, None, None]
    head = torch.arange(heads, device=index.device)[:, None]
    return [sample, index // cols, None, index % cols, None, head]


def gather(
    q: Tensor,
    height: int,
    width: int,
    heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    """The patches, see :func:`mmsoft.ops.landmark_patches`."""
    image = q.reshape(q.shape[0], height, width, heads, q.shape[2] // heads)
    if height < stride or width < stride:
        down, right = max(stride - height, 0), max(stride - width, 0)
        image = F.pad(image, (0, 0, 0, 0, 0, right, 0, down))
    patches, even, (rows, cols) = _select(image, stride, max_landmarks)
    if index is not None:  # [B, heads, m, r, r, d]
        chosen = torch.ops.aten.index(patches, _at(index, cols)).transpose(1, 2)
        return chosen.flatten(3, 4).clone(memory_format=torch.contiguous_format)
    if even is not None:
        patches = patches[:, even[0]][:, :, :, even[1]]
    blocks = patches.permute(0, 1, 3, 5, 2, 4, 6).clone(memory_format=torch.contiguous_format)
    return blocks.view(q.shape[0], rows * cols, heads, stride * stride, image.shape[-1])


def scatter(
    grad: Tensor,
    height: int,
    width: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    """The transpose of :func:`gather`: patches back to tokens, 0 where there is none."""
    batch, _, heads, _, d = grad.shape
    image = grad.new_zeros(batch, max(height, stride), max(width, stride), heads, d)
    patches, even, kept = _select(image, stride, max_landmarks)
    if index is not None:  # a patch may occur twice
        grad = grad.unflatten(3, (stride, stride)).transpose(1, 2)
        torch.ops.aten.index_put_(patches, _at(index, kept[1]), grad, True)
        return image[:, :height, :width].reshape(batch, height * width, heads * d).clone()
    grad = grad.reshape(batch, *kept, heads, stride, stride, d).permute(0, 1, 4, 2, 5, 3, 6)
    if even is None:
        patches.copy_(grad)
    else:  # indices around a slice move to the front
        patches[:, even[0][:, None], :, even[1]] = grad.permute(1, 3, 0, 2, 4, 5, 6)
    return image[:, :height, :width].reshape(batch, height * width, heads * d).clone()
