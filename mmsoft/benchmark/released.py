"""The released algorithm instead of our attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsoft.models import SOFTPlusPlus
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops.island import no_autocast
from mmsoft.registry import MODELS


def _materialized_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`exp(-|x_i - y_j|^2 / 2)`, `[B, heads, n, d], [B, heads, m, d] -> [B, heads, n, m]`."""
    squared = x.square().sum(-1, keepdim=True) + y.square().sum(-1)[..., None, :]
    return torch.exp(-0.5 * (squared - 2 * x @ y.mT))


def _guarded_newton(a: Tensor, steps: int) -> Tensor:
    """The released inverse: one step size for the whole batch, halved while the start diverges."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    alpha = 2 / a.sum(-1).max() ** 2
    x, halvings = alpha * a, 0
    while halvings < 10 and (eye - a @ x).abs().sum(-2).max() > 1.01:
        alpha, halvings = alpha / 2, halvings + 1
        x = alpha * a
    for _ in range(steps):
        x = 2 * x - x @ a @ x
    return x


class ReleasedAttention(SoftmaxFreeAttention):
    """SOFT++ attention as released.

    Landmarks at the fixed stride, by a convolution over the folded heads; both kernel matrices in
    memory; the inverse multiplied from the left, before the values.
    """

    def attend(self, q: Tensor, v: Tensor, hw_shape: tuple[int, int], *_: Any) -> Tensor:
        """The attention term, from scaled queries and values ``[B, H*W, C]``."""
        assert isinstance(self.landmark_conv, nn.Conv2d)
        with no_autocast(q):
            q, v = (
                t.float().unflatten(2, (self.num_heads, -1)).transpose(1, 2).contiguous()
                for t in (q, v)
            )
            image = q.flatten(0, 1).unflatten(1, hw_shape).permute(0, 3, 1, 2)
            conv = self.landmark_conv
            landmarks = F.conv2d(image, conv.weight, stride=conv.stride).flatten(2).mT
            landmarks = F.gelu(self.landmark_norm(landmarks)).unflatten(0, q.shape[:2])
            kernel = _materialized_kernel(q, landmarks)
            a = _materialized_kernel(landmarks, landmarks)
            scale = a.sum(-1, keepdim=True).rsqrt()
            inverse = scale * _guarded_newton(a, self.newton_steps) * scale.mT
            out = (kernel @ inverse) @ (kernel.mT @ v)
        return out.transpose(1, 2).flatten(2)


@MODELS.register_module()
class ReleasedSOFTPlusPlus(SOFTPlusPlus):
    """SOFT++ with the released algorithm; same arguments, but solver and budget have no effect."""

    def build_attention(self, **options: Any) -> ReleasedAttention:
        """Build the attention of one block."""
        return ReleasedAttention(**options)
