"""Our custom operators, and pooling, in plain torch, for programs that leave this process.

Elsewhere a custom operator decides when it runs how to compute; a program without MMSOFT has to
hold one way that serves every size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmsoft.ops.gaussian.kernel import COORDINATE_MAX, centre
from mmsoft.ops.inverse import eager as inverse
from mmsoft.ops.island import compute_dtype
from mmsoft.ops.landmarks import eager as landmarks
from mmsoft.ops.landmarks import landmark_grid
from mmsoft.ops.landmarks.choice import as_points, nearest_their_mean
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
    kept = landmark_grid(height, width, stride, max_landmarks)
    side = torch.arange(stride, device=q.device)
    down, across = (
        spread(n, k, q.device)[:, None] * stride + side for n, k in zip((rows, cols), kept)
    )
    # By number: torch cannot tell that patches fit into the tokens, which a slice would have to.
    tokens = (down[:, None, :, None] * width + across[:, None]).flatten()
    every = q.index_select(1, tokens)
    every = every.reshape(q.shape[0], kept[0] * kept[1], stride * stride, heads, -1)
    every = every.transpose(2, 3)  # [B, m, heads, r*r, d]
    if index is None:
        return every
    every = every.transpose(1, 2)  # [B, heads, m, r*r, d]
    taken = index[..., None, None].expand(-1, -1, -1, *every.shape[3:])
    return every.gather(2, taken).transpose(1, 2)


def choose(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The choice of landmarks as a loop of the program, where eager's steps are Python's.

    It takes any number of candidates and has one step in the file. There are always ``budget``
    landmarks: what eager does not give is absent.
    """
    from torch._higher_order_ops.while_loop import while_loop_op  # not in all versions of torch

    batch, heads, _, _ = candidates.shape
    points, there = as_points(candidates, mask)
    half = points.square().sum(2, keepdim=True) * 0.5
    ones = torch.ones_like(half)
    left_side, right_side = torch.cat((points, ones, -half), 2), torch.cat((points, -half, ones), 2)
    nearest = nearest_their_mean(points, there)
    residual = ones.squeeze(2)  # [P, M]
    if there is not None:
        residual = residual.masked_fill(~there, -1)
    step = torch.zeros((), dtype=torch.int64)
    factor = half.new_zeros(half.shape[0], budget, half.shape[1])
    pivots = torch.zeros_like(factor[..., 0], dtype=torch.int64)
    present = torch.zeros_like(pivots, dtype=torch.bool)

    def goes_on(step: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        return (step < budget) & (residual > tolerance).any()

    def take(
        step: Tensor,
        residual: Tensor,
        factor: Tensor,
        pivots: Tensor,
        present: Tensor,
        *constants: Tensor,
    ) -> tuple[Tensor, ...]:
        left_side, right_side, nearest = constants
        pivot = torch.where(step == 0, nearest, residual.argmax(1, keepdim=True))
        left = residual.gather(1, pivot)
        own = left_side.gather(1, pivot[..., None].expand(-1, 1, left_side.shape[2]))
        row = (own @ right_side.mT).squeeze(1).clamp(max=0).exp().scatter(1, pivot, 1.0)
        before = factor.gather(2, pivot[:, None].expand(-1, budget, 1)).mT
        row = row - (before @ factor).squeeze(1)
        new = left > tolerance
        row = row * torch.where(new, left.clamp(min=1e-12).rsqrt(), 0)
        now = torch.arange(budget) == step
        factor = torch.where(now[:, None], row[:, None], factor)
        residual = (residual - row.square()).scatter(1, pivot, -1.0)
        pivots = torch.where(now & new, pivot, pivots)
        return step + 1, residual, factor, pivots, present | (now & new)

    carried: Any = step, residual, factor, pivots, present
    *_, pivots, present = while_loop_op(goes_on, take, carried, (left_side, right_side, nearest))
    return pivots.unflatten(0, (batch, heads)), present.unflatten(0, (batch, heads))


def pool(image: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """Adaptive average pooling of ``[B, C, H, W]``; ONNX has it for sizes that are known alone."""
    height, width = image.shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        return F.adaptive_avg_pool2d(image, output_size)
    rows, cols = (output_size,) * 2 if isinstance(output_size, int) else output_size
    image = F.linear(image, _means(width, cols, image)).mT
    return F.linear(image, _means(height, rows, image)).mT


def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """Numbers become 0 by a product: onnxruntime takes five times as long where it selects."""
    if value == 0 and x.is_floating_point():
        return x * (~mask).to(x.dtype)
    return torch.where(mask, value, x)


def _means(size: int, kept: int, x: Tensor) -> Tensor:
    """The matrix ``[kept, size]`` whose product is the adaptive average pooling of a side."""
    token = torch.arange(size, device=x.device)
    mean = torch.arange(kept, device=x.device)[:, None]
    inside = (token >= mean * size // kept) & (token * kept < (mean + 1) * size)
    inside = inside.to(x.dtype)
    return inside / inside.sum(1, keepdim=True)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    """The step size in plain torch, the iteration by its operator."""
    if alpha is None or cubic is None:
        alpha, cubic = inverse.step_size(a)
    return torch.ops.mmsoft.newton_raphson_pinv(a, alpha, cubic, steps)


_EVERYWHERE: dict[str, Callable[..., Any]] = dict(
    gaussian_kernel_product=product,
    landmark_patches=patches,
    matmul=_multiply,
    newton_raphson_pinv=newton,
)
# What ONNX cannot express, or only as a loop: see functions.py.
_TORCH_ALONE: dict[str, Callable[..., Any]] = dict(
    landmark_choice=choose,
    newton_raphson_pinv=inverse.newton,
    tikhonov_solve=inverse.solve,
)


class PlainTorch(TorchFunctionMode):
    """While a program is recorded, put plain torch in the place of what a program cannot hold.

    Args:
        linear_algebra: also of the inverses and the choice of landmarks.
    """

    def __init__(self, linear_algebra: bool):
        super().__init__()
        bodies = _EVERYWHERE | (_TORCH_ALONE if linear_algebra else {})
        self.bodies: dict[Any, Callable[..., Any]] = {
            F.adaptive_avg_pool2d: pool,
            Tensor.masked_fill: masked_fill,
        }
        for name, body in bodies.items():
            packet = getattr(torch.ops.mmsoft, name)
            self.bodies |= {packet: body, packet.default: body}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.bodies.get(func, func)(*args, **(kwargs or {}))
