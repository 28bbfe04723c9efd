"""The attention layers: softmax-free (stages 1 to 3) and ordinary (stage 4)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mmsoft.ops import softmax_free_attention


def landmark_grid(height: int, width: int, max_landmarks: int | None) -> tuple[int, int]:
    """The grid of at most ``max_landmarks`` cells nearest to the aspect of ``height x width``."""
    if max_landmarks is None or height * width <= max_landmarks:
        return height, width
    rows = max(1, min(int(math.sqrt(max_landmarks * height / width)), height, max_landmarks))
    return rows, min(width, max_landmarks // rows)


class SoftmaxFreeAttention(nn.Module):
    """Softmax-free multi-head attention over a grid of tokens (SOFT, section 3).

    Queries are also the keys. Landmarks are sampled from the queries, head by head with shared
    weights; the value path adds a depthwise convolution with one filter per head.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads; ``C / num_heads`` channels each.
        landmark_stride: tokens per landmark along each axis.
        value_kernel: size of the depthwise convolution of the values, odd.
        normalize: the symmetric normalization of SOFT++.
        max_landmarks: average-pool the sampled grid to at most this many landmarks; ``None`` for as
            many as the stride gives.
        landmark_sampling: ``'conv'``, or ``'avg'`` as in the paper's ablation.
        landmark_norm_init: initial weight of the landmarks' LayerNorm; 1 in the release.
        solver: see :func:`mmsoft.ops.softmax_free_attention`.
        newton_steps: likewise.
        drop_rate: dropout after the projection.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        landmark_stride: int,
        value_kernel: int,
        *,
        normalize: bool,
        max_landmarks: int | None = None,
        landmark_sampling: str = "conv",
        landmark_norm_init: float = 1.0,
        solver: str = "newton",
        newton_steps: int = 20,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.landmark_stride = landmark_stride
        self.normalize = normalize
        self.max_landmarks = max_landmarks
        self.solver = solver
        self.newton_steps = newton_steps

        self.query = nn.Linear(embed_dims, embed_dims)
        self.value = nn.Linear(embed_dims, embed_dims)
        self.landmark_conv = None
        if landmark_sampling == "conv":
            self.landmark_conv = nn.Conv2d(
                self.head_dims, self.head_dims, landmark_stride, landmark_stride, bias=False
            )
        self.landmark_norm = nn.LayerNorm(self.head_dims)
        nn.init.constant_(self.landmark_norm.weight, landmark_norm_init)
        self.value_conv = nn.Conv2d(
            num_heads,
            num_heads,
            value_kernel,
            padding=value_kernel // 2,
            groups=num_heads,
            bias=False,
        )
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, landmark_stride={self.landmark_stride}, "
            f"max_landmarks={self.max_landmarks}, normalize={self.normalize}, solver={self.solver}"
        )

    def sample_landmarks(self, q: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Landmarks of the queries ``[B, H*W, C]``: ``[B, heads, m, d]``."""
        (height, width), r, d = hw_shape, self.landmark_stride, self.head_dims
        q = q.view(-1, height, width, q.shape[-1])
        if height < r or width < r:  # at least one landmark
            q = F.pad(q, (0, 0, 0, max(r - width, 0), 0, max(r - height, 0)))
        rows, cols = max(height // r, 1), max(width // r, 1)
        # A convolution whose stride is its kernel is a product with patches; the heads stay where
        # they are, with no folding into the batch. As in a convolution, a remainder is cut off.
        patches = q[:, : rows * r, : cols * r].reshape(-1, rows, r, cols, r, self.num_heads, d)
        if self.landmark_conv is None:
            grid = patches.mean((2, 4))  # [B, rows, cols, heads, d]
        else:
            patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
            weight = self.landmark_conv.weight.permute(0, 2, 3, 1).flatten(1)
            grid = F.linear(patches, weight)
        target = landmark_grid(rows, cols, self.max_landmarks)
        if target != (rows, cols):
            pooled = F.adaptive_avg_pool2d(grid.flatten(3).permute(0, 3, 1, 2), target)
            grid = pooled.permute(0, 2, 3, 1).unflatten(3, (self.num_heads, d))
        landmarks = F.gelu(self.landmark_norm(grid))
        return landmarks.flatten(1, 2).transpose(1, 2)

    def convolve_values(self, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The depthwise convolution of ``v [B, H*W, C]``, one filter for all channels of a head."""
        image = v.view(-1, *hw_shape, v.shape[-1]).permute(0, 3, 1, 2)  # channels-last memory
        weight = self.value_conv.weight.repeat_interleave(self.head_dims, 0)
        out = F.conv2d(image, weight, padding=self.value_conv.padding, groups=v.shape[-1])
        return out.permute(0, 2, 3, 1).reshape(v.shape)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: tokens ``[B, H*W, C]``, row by row.
            hw_shape: ``(H, W)``.

        Returns:
            ``[B, H*W, C]``.

        Raises:
            ValueError: ``x`` does not have ``H*W`` tokens.
        """
        if x.shape[1] != hw_shape[0] * hw_shape[1]:
            raise ValueError(
                f"x must have H*W = {hw_shape[0]}*{hw_shape[1]} tokens, got {x.shape[1]}"
            )
        # The weight is scaled, not the activation: it is the smaller of the two.
        scale = self.head_dims**-0.25
        q = F.linear(x, self.query.weight * scale, self.query.bias * scale)
        v = self.value(x)
        landmarks = self.sample_landmarks(q, hw_shape)
        out = softmax_free_attention(
            self._split_heads(q),
            self._split_heads(v),
            landmarks,
            normalize=self.normalize,
            solver=self.solver,
            steps=self.newton_steps,
        )
        out = out.transpose(1, 2).flatten(2) + self.convolve_values(v, hw_shape)
        return self.drop(self.proj(out))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dims)).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """Ordinary multi-head self-attention, ``[B, N, C] -> [B, N, C]``."""

    def __init__(self, embed_dims: int, num_heads: int, drop_rate: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dims, embed_dims)
        self.key_value = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of ``x``."""
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.query(x), *self.key_value(x).chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))
