"""The attention layers of sequences: softmax-free, and what it is compared with.

All are called as ``attn(x, mask)`` with tokens ``[B, N, C]`` and a bool mask ``[B, N]``, False for
padding, or ``None``. Padding changes nothing in the other tokens' results; its own mean nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsoft.ops import (
    gaussian_kernel_product,
    salient_mean,
    softmax_attention,
)
from mmsoft.ops.gaussian import leave_out
from mmsoft.ops.island import compute_dtype
from mmsoft.ops.mask import all_if_none

from .attention import SoftmaxFreeAttention
from .peers import build_peer


class LandmarkConv1d(nn.Conv1d):
    """A convolution whose stride is its kernel, of patches ``[..., r, d]``: ``[..., d]``."""

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, stride, stride, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """One product, because a patch is all that an output depends on."""
        return F.linear(patches.flatten(-2), self.weight.transpose(1, 2).flatten(1))


class ValueConv1d(nn.Conv1d):
    """A depthwise convolution of ``[B, N, C]`` with one filter for all channels of a head."""

    def __init__(self, num_heads: int, kernel_size: int):
        padding = kernel_size // 2
        super().__init__(
            num_heads, num_heads, kernel_size, padding=padding, groups=num_heads, bias=False
        )

    def forward(self, v: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        channels = v.shape[2]
        weight = self.weight.repeat_interleave(channels // self.out_channels, 0)
        return F.conv1d(v.mT, weight, padding=self.padding, groups=channels).mT


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


class SequenceAttention(SoftmaxFreeAttention):
    """Softmax-free multi-head attention over a sequence of tokens.

    As for images, with patches of ``r`` tokens in a row, a remainder of which is filled up with
    zeros, and a convolution of the values along the sequence.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads; ``C / num_heads`` channels each.
        landmark_stride: tokens ``r`` per landmark.
        value_kernel: size of the depthwise convolution of the values, odd; 0 for none.
        landmark_sampling: ``'conv'`` or ``'avg'``, as there.
        options: those of :class:`~mmsoft.models.attention.SoftmaxFreeAttention`, in which
            ``max_landmarks`` limits landmarks by content alone.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        landmark_stride: int,
        value_kernel: int,
        *,
        landmark_sampling: str = "conv",
        **options: Any,
    ):
        super().__init__(
            embed_dims, num_heads, landmark_stride, 1, landmark_sampling="avg", **options
        )
        if landmark_sampling == "conv":
            self.landmark_conv = LandmarkConv1d(self.head_dims, landmark_stride)
        conv = ValueConv1d(num_heads, value_kernel) if value_kernel else None
        self.value_conv = conv  # type: ignore[assignment]

    @property
    def patch_tokens(self) -> int:
        """Tokens of a patch."""
        return self.landmark_stride

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attend: ``[B, N, C] -> [B, N, C]``."""
        q, v = self.queries_and_values(x)
        q, v = _zero_padding(q, mask), _zero_padding(v, mask)
        out = self.attend(q, v, mask)
        if self.value_conv is not None:
            out = out + self.value_conv(v)
        return self.drop(self.proj(out))

    def attend(  # type: ignore[override]
        self, q: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The attention term alone, from scaled queries and values ``[B, N, C]``."""
        landmarks, present, patches = self.sample_landmarks(q, mask)
        return self.operate(q, v, landmarks, present, mask=mask, landmark_mask=patches)

    def sample_landmarks(  # type: ignore[override]
        self, q: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Landmarks of queries ``[B, N, C]`` that are 0 in padding.

        Returns:
            ``[B, heads, m, d]``; by content which of them there are, ``[B, heads, m]``; else which
            have a token that is not padding, ``[B, m]``, ``None`` for all.
        """
        stride = self.landmark_stride
        filled = -q.shape[1] % stride
        tokens = F.pad(q, (0, 0, 0, filled)).unflatten(2, (self.num_heads, self.head_dims))
        patches = tokens.unflatten(1, (-1, stride)).transpose(2, 3)  # [B, M, heads, r, d]
        if mask is None and (filled == 0 or not self.by_content):
            valid = None
        else:
            mask = torch.ones_like(q[..., 0], dtype=torch.bool) if mask is None else mask
            valid = F.pad(mask, (0, filled)).unflatten(1, (-1, stride))  # [B, M, r]
        there = None if valid is None else valid.any(-1)
        if not self.by_content:
            sampled = patches.mean(3) if self.landmark_conv is None else self.landmark_conv(patches)
            return F.gelu(self.landmark_norm(sampled)).transpose(1, 2), None, there
        with torch.no_grad():
            total = q.to(compute_dtype(q)).sum(1)
            count = q.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
            centre = (total / count).unflatten(1, (self.num_heads, self.head_dims))
            of_patch = None if valid is None else valid[:, :, None]
            every = salient_mean(patches, centre, of_patch).transpose(1, 2)
            index, present = self.choose(every, there, (q.shape[1], 1))
            present = present if there is None else all_if_none(present)  # of padding alone
        patches = patches.transpose(1, 2)  # [B, heads, M, r, d]
        where = index[..., None, None].expand(-1, -1, -1, *patches.shape[3:])
        chosen = patches.gather(2, where).transpose(1, 2)
        if valid is not None:
            heads = valid[:, None].expand(-1, self.num_heads, -1, -1)
            of_patch = heads.gather(2, where[..., 0]).transpose(1, 2)
        landmarks = salient_mean(chosen, centre, of_patch)
        return self._with_idle(landmarks.transpose(1, 2)), present, None


class _Compared(nn.Module):
    """What the layers that need no landmarks share: values, their convolution, projection.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads.
        value_kernel: size of the depthwise convolution of the values, odd; 0 for none.
        drop_rate: dropout after the projection.
    """

    def __init__(self, embed_dims: int, num_heads: int, value_kernel: int, drop_rate: float):
        super().__init__()
        self.num_heads = num_heads
        self.value = nn.Linear(embed_dims, embed_dims)
        self.value_conv = ValueConv1d(num_heads, value_kernel) if value_kernel else None
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend: ``[B, N, C] -> [B, N, C]``."""
        v = _zero_padding(self.value(x), mask)
        out = self.attend(x, v, mask)
        if self.value_conv is not None:
            out = out + self.value_conv(v)
        return self.drop(self.proj(out))

    def heads(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, heads, N, C / heads]``."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention term alone: here each token sees itself and no other."""
        return v


class NoSequenceAttention(_Compared):
    """The layer without attention: every token keeps its own value."""


class SoftmaxSequenceAttention(_Compared):
    """Ordinary softmax attention, quadratic."""

    def __init__(self, embed_dims: int, num_heads: int, value_kernel: int, drop_rate: float):
        super().__init__(embed_dims, num_heads, value_kernel, drop_rate)
        self.query = nn.Linear(embed_dims, embed_dims)
        self.key = nn.Linear(embed_dims, embed_dims)

    def attend(self, x: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention term alone."""
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(v)
        bias = None
        if mask is not None:
            bias = q.new_zeros(q.shape[0], 1, 1, q.shape[2])
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        out = softmax_attention(q, k, v, bias, scale=q.shape[-1] ** -0.5)
        return out.transpose(1, 2).flatten(2)


class GaussianSequenceAttention(_Compared):
    """What softmax-free attention approximates, quadratic: ``S v``, with its own queries as keys.

    With ``normalize``, as SOFT++ would with every token as a landmark that resembles all others,
    ``R^-1/2 S R^-1/2 v``, ``R`` the row sums of ``S``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        value_kernel: int,
        drop_rate: float,
        normalize: bool,
    ):
        super().__init__(embed_dims, num_heads, value_kernel, drop_rate)
        self.query = nn.Linear(embed_dims, embed_dims)
        self.normalize = normalize

    def attend(self, x: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention term alone; in float32 whatever autocast says."""
        q, values = self.heads(self.query(x)), self.heads(v)
        q = q * q.shape[-1] ** -0.25
        there = torch.ones_like(q[..., :1])
        if mask is not None:
            there = there * mask[:, None, :, None]
            q = leave_out(q, mask[:, None, :, None])
        if self.normalize:
            root = gaussian_kernel_product(q, q, there).clamp(min=1e-6).rsqrt()
            out = root * gaussian_kernel_product(q, q, root * values)
        else:
            out = gaussian_kernel_product(q, q, values)
        return out.to(v.dtype).transpose(1, 2).flatten(2)


class PeerSequenceAttention(nn.Module):
    """A peer's layer from its own package, with its defaults, and our number of landmarks.

    Linformer's and Performer's have no mask: tokens that are padding enter as 0, which changes
    nothing in Linformer, whose projections have no bias; Performer's normalization counts them, and
    Nystromformer's landmarks are parts of all tokens, padding included. These two therefore get
    sequences filled up to ``tokens``, as published, whatever the batch's longest one is.
    """

    def __init__(
        self,
        name: str,
        embed_dims: int,
        num_heads: int,
        tokens: int,
        value_kernel: int,
        landmarks: int,
        drop_rate: float,
    ):
        super().__init__()
        options: dict[str, Any] = {}
        if name == "nystromformer":
            options = dict(residual=value_kernel > 0, residual_conv_kernel=value_kernel or 1)
            options.update(num_landmarks=landmarks)
        elif value_kernel:
            raise ValueError(f"value_kernel must be 0: {name} has no convolution of values")
        self.name = name
        self.fill_to = 0 if name == "linformer" else tokens
        self.layer = build_peer(name, embed_dims, num_heads, tokens, **options)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend: ``[B, N, C] -> [B, N, C]``."""
        x, length = _zero_padding(x, mask), x.shape[1]
        if (missing := self.fill_to - length) > 0:
            mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return self.drop(self.layer(x, mask=mask)[:, :length])  # Linformer's ignores the mask
