"""Our custom operators in plain torch, for programs that leave this process.

Elsewhere a custom operator decides when it runs how to compute; a program without MMSOFT has to
hold one way that serves every size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmsoft.ops.gaussian.kernel import COORDINATE_MAX, centre
from mmsoft.ops.inverse import eager as inverse
from mmsoft.ops.island import compute_dtype
from mmsoft.ops.landmarks import choice, landmark_grid
from mmsoft.ops.landmarks import eager as landmarks
from mmsoft.ops.landmarks.grid import spread


def product(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> Tensor:
    """The product with the Gaussian kernel, which is stored; the exponent is one product.

    Both products of a layer begin alike, with the kernel of tokens and landmarks, so that a runtime
    which looks for common parts computes it once.
    """
    dtype = compute_dtype(x, y, w)
    tokens, landmarks = (t.to(dtype).clamp(-COORDINATE_MAX, COORDINATE_MAX) for t in (x, y))
    if divide:
        tokens, landmarks = landmarks, tokens
    origin = centre(landmarks)
    tokens, landmarks = tokens - origin, landmarks - origin
    half, other = (-0.5 * t.square().sum(-1, keepdim=True) for t in (tokens, landmarks))
    tokens = torch.cat((tokens, torch.ones_like(half), half), -1)
    landmarks = torch.cat((landmarks, other, torch.ones_like(other)), -1)
    kernel = (tokens @ landmarks.mT).clamp(max=0).exp()
    w = w.to(dtype)
    if divide:
        return kernel.mT @ (w if unit is None else w / unit)
    return kernel @ w if unit is None else unit * (kernel @ w)


def patches(
    q: Tensor,
    height: int,
    width: int,
    heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None = None,
) -> Tensor:
    """The patches of landmarks, for sizes that are not known yet.

    Even a budget that is not reached selects, because which of them does is not known either.
    """
    if isinstance(height, int) and isinstance(width, int):
        return landmarks.gather(q, height, width, heads, stride, max_landmarks, index)
    rows, cols = landmark_grid(height, width, stride)
    image = q.reshape(q.shape[0], height, width, heads, q.shape[2] // heads)
    image = image[:, : rows * stride, : cols * stride]
    image = image.unflatten(2, (cols, stride)).unflatten(1, (rows, stride))
    if max_landmarks is not None:
        kept = landmark_grid(height, width, stride, max_landmarks)
        image = image.index_select(1, spread(rows, kept[0], q.device))
        image = image.index_select(3, spread(cols, kept[1], q.device))
        rows, cols = kept
    blocks = image.permute(0, 1, 3, 5, 2, 4, 6)
    every = blocks.reshape(q.shape[0], rows * cols, heads, stride * stride, -1)
    if index is None:
        return every
    every = every.transpose(1, 2)  # [B, heads, m, r*r, d]
    taken = index[..., None, None].expand(-1, -1, -1, *every.shape[3:])
    return every.gather(2, taken).transpose(1, 2)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


_EVERYWHERE: dict[str, Callable[..., Any]] = dict(
    gaussian_kernel_product=product,
    landmark_patches=patches,
    matmul=_multiply,
    newton_step_size=inverse.step_size,
)
# What ONNX cannot express, or only as a loop: see functions.py.
_TORCH_ALONE: dict[str, Callable[..., Any]] = dict(
    landmark_choice=choice.choose,
    newton_raphson_pinv=inverse.newton,
    tikhonov_solve=inverse.solve,
)


class PlainTorch(TorchFunctionMode):
    """While a program is recorded, put plain torch in the place of our custom operators.

    Args:
        linear_algebra: also of the inverses and the choice of landmarks.
    """

    def __init__(self, linear_algebra: bool):
        super().__init__()
        bodies = _EVERYWHERE | (_TORCH_ALONE if linear_algebra else {})
        self.bodies: dict[Any, Callable[..., Any]] = {}
        for name, body in bodies.items():
            packet = getattr(torch.ops.mmsoft, name)
            self.bodies |= {packet: body, packet.default: body}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.bodies.get(func, func)(*args, **(kwargs or {}))
