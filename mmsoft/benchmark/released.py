"""The released algorithm, as an attention term that takes the place of ours."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsoft.models.attention import SoftmaxFreeAttention


def _materialised_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`exp(-|x_i - y_j|^2 / 2)`, `[B, heads, n, d], [B, heads, m, d] -> [B, heads, n, m]`."""
    squared = x.square().sum(-1, keepdim=True) + y.square().sum(-1)[..., None, :]
    return torch.exp(-0.5 * (squared - 2 * x @ y.mT))


def _guarded_newton(a: Tensor, steps: int) -> Tensor:
    """The released inverse: one step size for the whole batch, halved while the start diverges."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    alpha = 2 / a.sum(-1).max() ** 2
    v, halvings = alpha * a, 0
    while halvings < 10 and (eye - a @ v).abs().sum(-2).max() > 1.01:
        alpha, halvings = alpha / 2, halvings + 1
        v = alpha * a
    for _ in range(steps):
        v = 2 * v - v @ a @ v
    return v


def released_attend(
    layer: SoftmaxFreeAttention, q: Tensor, v: Tensor, hw_shape: tuple[int, int]
) -> Tensor:
    """The attention term as released: same arguments and result as `layer.attend`.

    Landmarks at the fixed stride, by a convolution over the folded heads; both kernel matrices in
    memory; the inverse multiplied from the left before the values are looked at; SOFT++.
    """
    assert isinstance(layer.landmark_conv, nn.Conv2d)
    with torch.autocast(q.device.type, enabled=False):
        q, v = (
            t.float().unflatten(2, (layer.num_heads, -1)).transpose(1, 2).contiguous()
            for t in (q, v)
        )
        image = q.flatten(0, 1).unflatten(1, hw_shape).permute(0, 3, 1, 2)
        conv = layer.landmark_conv
        landmarks = F.conv2d(image, conv.weight, stride=conv.stride).flatten(2).mT
        landmarks = F.gelu(layer.landmark_norm(landmarks)).unflatten(0, q.shape[:2])
        kernel = _materialised_kernel(q, landmarks)
        a = _materialised_kernel(landmarks, landmarks)
        scale = a.sum(-1, keepdim=True).rsqrt()
        inverse = scale * _guarded_newton(a, layer.newton_steps) * scale.mT
        out = (kernel @ inverse) @ (kernel.mT @ v)
    return out.transpose(1, 2).flatten(2)


def use_released_attention(model: nn.Module) -> nn.Module:
    """Replace the attention term of every softmax-free layer of a SOFT++ backbone.

    The one place that reaches into our layers, until a block receives its attention module.
    """
    for layer in model.modules():
        if isinstance(layer, SoftmaxFreeAttention):
            layer.attend = partial(released_attend, layer)  # type: ignore[method-assign]
    return model
