"""The attention layers: softmax-free (stages 1 to 3) and ordinary (stage 4)."""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmsoft.ops import (
    choose_landmarks,
    landmark_candidates,
    landmark_grid,
    landmark_patches,
    salient_mean,
    softmax_attention,
    softmax_free_attention,
)
from mmsoft.ops.island import compute_dtype, matmul
from mmsoft.ops.library import smaller
from mmsoft.ops.mask import TokenMask, all_if_none
from mmsoft.ops.mode import cpu_shortcut, recorded, traced, transformed
from mmsoft.ops.softmax import LandmarkMeans, attend_landmarks, landmark_means, read_landmarks

from .padding import Inside, TakesPadding
from .plain import is_plain

MANY_LANDMARKS = 256


def _pooled(image: Tensor, rows: int, cols: int) -> Tensor:
    """``adaptive_avg_pool2d`` of ``[B, C, H, W]`` to ``[B, C, rows, cols]``."""
    if image.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(image, (rows, cols))
    # A GPU has no deterministic backward pass of it.
    return averages(image, rows, cols)


def averages(image: Tensor, rows: int, cols: int) -> Tensor:
    """The same, to ``[B, C, rows, cols]``, as products with the means along each side."""
    numbers = image.to(compute_dtype(image))
    down, across = (
        _means(*sizes, numbers) for sizes in ((image.shape[2], rows), (image.shape[3], cols))
    )
    return matmul(matmul(down, numbers), across.mT).to(image.dtype)


def _means(size: int, parts: int, like: Tensor) -> Tensor:
    """Weights ``[parts, size]``: a row is the mean of a part as adaptive pooling cuts it."""
    part = torch.arange(parts, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    of_part = (place >= part * size // parts) & (place * parts < (part + 1) * size)
    return of_part.to(like.dtype) / of_part.sum(1, keepdim=True)


@cache  # once
def _warn_of_many_landmarks() -> None:
    print_log(
        f"a backbone has more than {MANY_LANDMARKS} landmarks and solver='newton', whose cost "
        "grows with the cube of their number and can take most of the time. max_landmarks=49 "
        "limits them at any image size, solver='direct' costs less (docs/options.md)",
        logger="current",
        level=logging.WARNING,
    )


def _inverse_gelu(y: float) -> float:
    """The ``x >= 0`` with ``x Phi(x) = y``, by bisection."""
    low, high = 0.0, y + 1
    for _ in range(60):
        middle = (low + high) / 2
        if middle * 0.5 * (1 + math.erf(middle / math.sqrt(2))) < y:
            low = middle
        else:
            high = middle
    return low


class LandmarkConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, of patches ``[..., r*r, d]``: ``[..., d]``."""

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, stride, stride, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """One product, because a patch is all that an output depends on."""
        return F.linear(patches.flatten(-2), self.weight.permute(0, 2, 3, 1).flatten(1))


class ValueConv2d(nn.Conv2d):
    """A depthwise convolution of ``[B, C, H, W]`` with one filter for all channels of a head."""

    def __init__(self, num_heads: int, kernel_size: int):
        padding = kernel_size // 2
        super().__init__(
            num_heads, num_heads, kernel_size, padding=padding, groups=num_heads, bias=False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Any memory format, which the result keeps."""
        channels = image.shape[1]
        weight = self.weight.repeat_interleave(channels // self.out_channels, 0)
        return F.conv2d(image, weight, padding=self.padding, groups=channels)


class SoftmaxFreeAttention(TakesPadding, nn.Module):
    """Softmax-free multi-head attention over a grid of tokens (SOFT, section 3).

    Queries are also the keys. Landmarks are sampled from the queries, head by head with shared
    weights; the value path adds a depthwise convolution with one filter per head.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads; ``C / num_heads`` channels each.
        landmark_stride: tokens per landmark along each axis.
        value_kernel: size of the depthwise convolution of the values, odd.
        normalize: the symmetric normalization of SOFT++.
        max_landmarks: keep at most this many of the landmarks that the stride gives: released ones
            evenly spread, by content those that explain the others; ``None`` for all of them.
        landmarks: ``'released'`` or ``'content'``, see :meth:`sample_landmarks`.
        landmark_sampling: ``'conv'``, or ``'avg'`` as in the paper's ablation.
        attn_init: ``'balanced'`` or ``'released'``, see :meth:`init_landmark_norm`.
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
        landmarks: str = "released",
        landmark_sampling: str = "conv",
        attn_init: str = "balanced",
        solver: str = "newton",
        newton_steps: int = 20,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.landmark_stride = landmark_stride
        self.normalize = normalize
        self.by_content = False
        self.max_landmarks = max_landmarks
        self.solver = solver
        self.newton_steps = newton_steps

        self.query = nn.Linear(embed_dims, embed_dims)
        self.value = nn.Linear(embed_dims, embed_dims)
        self.landmark_conv: nn.Module | None = None
        if landmark_sampling == "conv":
            self.landmark_conv = LandmarkConv2d(self.head_dims, landmark_stride)
        self.landmark_norm = nn.LayerNorm(self.head_dims)
        self.init_landmark_norm(attn_init)
        self.use_landmarks(landmarks)
        self.value_conv = ValueConv2d(num_heads, value_kernel)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, landmark_stride={self.landmark_stride}, "
            f"max_landmarks={self.max_landmarks}, normalize={self.normalize}, solver={self.solver}"
        )

    def init_landmark_norm(self, attn_init: str) -> None:
        """Set the scale of the attention term for training from scratch.

        Args:
            attn_init: ``'released'``: landmarks start far from each other and from the queries, and
                the term is 10 to 100 times smaller than the values' convolution and depends on the
                resolution. ``'balanced'``: landmarks overlap, at the distance from the queries
                where the term is about twice the mean value at every resolution. Derived in
                ``docs/method.md``; ``tools/analysis_tools/attention_scale.py`` shows the result.
        """
        nn.init.zeros_(self.landmark_norm.bias)
        nn.init.ones_(self.landmark_norm.weight)
        if attn_init == "balanced":
            # Without the normalization landmarks that overlap add up: 10 of the 49 at 224 pixels.
            tokens = self.patch_tokens / 2 * (1 if self.normalize else 10)
            distance = math.sqrt(math.log(max(tokens, 1)))
            nn.init.constant_(self.landmark_norm.weight, 0.3)
            nn.init.constant_(
                self.landmark_norm.bias, _inverse_gelu(distance / math.sqrt(self.head_dims))
            )

    @property
    def patch_tokens(self) -> int:
        """Tokens of a patch."""
        return self.landmark_stride**2

    def use_landmarks(self, landmarks: str) -> None:
        """Become the layer for which weights were trained: ``'released'`` or ``'content'``.

        Raises:
            ValueError: by content, without normalization.
        """
        if landmarks == "released" and self.by_content:
            self.by_content = False
            del self.content_landmarks
        elif landmarks == "content" and not self.by_content:
            if not self.normalize:
                raise ValueError("landmarks='content' are normalized: use SOFT++, not SOFT")
            self.by_content = True
            # In the state dict, so that weights tell for which landmarks they were trained.
            flag = torch.ones((), dtype=torch.uint8, device=self.landmark_norm.weight.device)
            self.register_buffer("content_landmarks", flag)

    def init_queries(self) -> None:
        """Let queries of unlike tokens start about one bandwidth of the kernel apart.

        The weight's standard deviation makes the squared distance of two independent tokens of unit
        variance 6 on average. Released landmarks have a place of their own, to which this does not
        apply.
        """
        if self.by_content:
            std = math.sqrt(3 / (math.sqrt(self.head_dims) * self.query.in_features))
            nn.init.trunc_normal_(self.query.weight, std=std)

    def queries_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries, which are the keys too, and values of ``x``; all ``[B, H*W, C]``."""
        scale = self.head_dims**-0.25
        if traced(x) or not is_plain(self.query, nn.Linear.forward):
            return self.query(x) * scale, self.value(x)
        # The product scales at no cost, where the result of a call would need another pass.
        weight, bias = self.query.weight, self.query.bias
        q = torch.addmm(bias, x.flatten(0, 1), weight.mT, beta=scale, alpha=scale)
        return q.unflatten(0, x.shape[:2]), self.value(x)

    def sample_landmarks(
        self, q: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Landmarks of the queries ``[B, H*W, C]``; those by content are not of padding.

        ``'released'``: GELU of LayerNorm of a strided convolution; a budget keeps patches at even
        distances. ``'content'``: the :func:`~mmsoft.ops.salient_mean` of a patch;
        :func:`~mmsoft.ops.choose_landmarks` keeps those that explain the others.

        Returns:
            ``[B, heads, m, d]`` and, by content, which of them there are (bool) and the numbers of
            their patches, row by row, both ``[B, heads, m]``.
        """
        grid = (hw_shape, self.num_heads, self.landmark_stride)
        if not self.by_content:
            patches = landmark_patches(q, *grid, self.max_landmarks)
            sampled = patches.mean(3) if self.landmark_conv is None else self.landmark_conv(patches)
            return F.gelu(self.landmark_norm(sampled)).transpose(1, 2), None, None
        with torch.no_grad():
            centre = self._centre(q, inside)
            whole = not traced(q) and min(hw_shape) >= self.landmark_stride
            valid = None if whole else self._inside(hw_shape, q.device)
        differentiated = q.requires_grad or transformed()
        if inside is not None and valid is not None and recorded(q) and not differentiated:
            # A mask, not all tokens.
            there = landmark_patches(inside.tokens()[:, :, None], hw_shape, 1, self.landmark_stride)
            valid = valid & there.squeeze(-1)  # [B, M, 1, r*r]
        elif inside is not None:  # in its place, what has no weight in the mean of a patch
            q = torch.where(inside.tokens()[:, :, None], q, centre.to(q.dtype)[:, None])
        centre = centre.unflatten(1, (self.num_heads, self.head_dims))
        with torch.no_grad():
            every = landmark_candidates(q, *grid, centre, valid)
            mask = None if inside is None else inside.patches(self.landmark_stride)
            index, present = self.choose(every, mask, hw_shape)
        if differentiated:
            chosen = salient_mean(landmark_patches(q, *grid, index=index), centre, valid)
            landmarks = chosen.transpose(1, 2)
        else:
            landmarks = every.gather(2, index[..., None].expand(-1, -1, -1, self.head_dims))
        return self._with_idle(landmarks), present, index

    def choose(
        self, candidates: Tensor, mask: Tensor | None, hw_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The choice by content, see :func:`~mmsoft.ops.choose_landmarks`, within the budget.

        Candidates ``[B, heads, M, d]`` are of the patches of the grid ``hw_shape``, row by row;
        ``mask`` ``[B, M]`` tells which count. Returns indices and which are there,
        ``[B, heads, m]``.
        """
        budget = candidates.shape[2] if self.max_landmarks is None else self.max_landmarks
        return choose_landmarks(candidates, budget, mask=mask)

    def _centre(self, q: Tensor, inside: Inside | None) -> Tensor:
        """The mean of the queries ``[B, C]``."""
        return q.to(compute_dtype(q)).mean(1) if inside is None else inside.mean(q).squeeze(1)

    def _with_idle(self, landmarks: Tensor) -> Tensor:
        """Landmarks by content that depend on the parameters of released ones, which they lack.

        By 0: released weights may be loaded once an optimizer and DistributedDataParallel know the
        parameters, and the latter waits for a gradient of each.
        """
        if not torch.is_grad_enabled() or (traced(landmarks) and not self.training):
            return landmarks
        parts = (self.landmark_norm, self.landmark_conv)
        idle = [p.flatten()[0] for part in parts if part is not None for p in part.parameters()]
        return landmarks + 0.0 * torch.stack(idle).sum()

    def _inside(self, hw_shape: tuple[int, int], device: torch.device) -> Tensor:
        """Which tokens of a patch are not padding, ``[r*r]``: all, unless the image is smaller."""
        side = torch.arange(self.landmark_stride, device=device)
        return ((side < hw_shape[0])[:, None] & (side < hw_shape[1])).flatten()

    def convolve_values(
        self, v: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None
    ) -> Tensor:
        """The depthwise convolution of ``v [B, H*W, C]``, one filter for all channels of a head.

        Beyond what is ``inside`` lie zeros.
        """
        if inside is not None and self.by_content:
            v = v.masked_fill(inside.padding()[:, :, None], 0)
        image = v.view(-1, *hw_shape, v.shape[-1]).permute(0, 3, 1, 2)  # channels-last memory
        return self.value_conv(image).permute(0, 2, 3, 1).reshape(v.shape)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens ``[B, H*W, C]``, row by row.
            hw_shape: ``(H, W)``.
            inside: which of them are not padding, from which nothing is read by content.

        Returns:
            ``[B, H*W, C]``.

        Raises:
            ValueError: ``x`` does not have ``H*W`` tokens.
        """
        self._check(x, hw_shape)
        q, v = self.queries_and_values(x)
        padding = () if inside is None else (inside,)
        out = self.attend(q, v, hw_shape, *padding)
        convolved = self.convolve_values(v, hw_shape, *padding)
        # In place where nothing is kept for a backward pass: large fresh memory is slow.
        out = out.add_(convolved) if cpu_shortcut(out) else out + convolved
        return self.drop(self.proj(out))

    def _check(self, x: Tensor, hw_shape: tuple[int, int]) -> None:
        if x.shape[1] != hw_shape[0] * hw_shape[1]:
            raise ValueError(
                f"x must have H*W = {hw_shape[0]}*{hw_shape[1]} tokens, got {x.shape[1]}"
            )

    def by_token(
        self, x: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None
    ) -> tuple[Any, ...]:
        """:meth:`forward` up to where no token's result needs another's; without a backward pass.

        Landmarks are by content. Arguments and errors are those of :meth:`forward`.

        Returns:
            For each sample the function that completes it, from any of its tokens of the tensors
            that follow, ``[1, n, C]`` each: queries and convolved values ``[B, H*W, C]``.
        """
        self._check(x, hw_shape)
        q, v = self.queries_and_values(x)
        means = self.gather(q, v, hw_shape, inside)

        def complete(means: LandmarkMeans, q: Tensor, convolved: Tensor) -> Tensor:
            return self.drop(self.proj(self.read(q, means).add_(convolved)))

        functions: list[Callable] = [partial(complete, means.of(b)) for b in range(len(x))]
        return functions, q, self.convolve_values(v, hw_shape, inside)

    def gather(
        self, q: Tensor, v: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None
    ) -> LandmarkMeans:
        """What :meth:`attend` takes from all tokens, landmarks by content."""
        landmarks, present, _ = self.sample_landmarks(q, hw_shape, inside)
        return landmark_means(self._heads(q), self._heads(v), landmarks, present, inside)

    def read(self, q: Tensor, means: LandmarkMeans) -> Tensor:
        """What it gives to any of the queries, ``[1, n, C]``."""
        return read_landmarks(self._heads(q), means).transpose(1, 2).flatten(2)

    def _heads(self, t: Tensor) -> Tensor:
        """``[B, N, C] -> [B, heads, N, d]``."""
        return t.unflatten(2, (self.num_heads, self.head_dims)).transpose(1, 2)

    def attention_scale(self, landmarks: Tensor, hw_shape: tuple[int, int]) -> float:
        """The factor of the softmax-free term, which keeps its size whatever the image's.

        The share of the possible landmarks that a budget left, because the term goes like N / m;
        exactly 1 where the budget is not reached.
        """
        if self.max_landmarks is None:
            return 1.0
        if torch.jit.is_tracing():  # as get_flops does: sizes are tensors there
            hw_shape = (int(hw_shape[0]), int(hw_shape[1]))
        rows, cols = landmark_grid(*hw_shape, self.landmark_stride)
        return landmarks.shape[2] / (rows * cols)

    def attend(
        self, q: Tensor, v: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None
    ) -> Tensor:
        """The attention term alone, from scaled queries and values ``[B, H*W, C]``."""
        padding = () if inside is None or not self.by_content else (inside,)
        landmarks, present, _ = self.sample_landmarks(q, hw_shape, *padding)
        newton = self.solver == "newton" and not self.by_content
        if newton and not traced(q) and landmarks.shape[2] > MANY_LANDMARKS:
            _warn_of_many_landmarks()
        scale = 1.0 if self.by_content else self.attention_scale(landmarks, hw_shape)
        mask = padding[0] if padding else None
        return self.operate(q, v, landmarks, present, mask=mask, scale=scale)

    def operate(
        self,
        q: Tensor,
        v: Tensor,
        landmarks: Tensor,
        present: Tensor | None = None,
        *,
        mask: Tensor | Inside | None = None,
        landmark_mask: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The layer's operator on ``[B, N, C]`` with landmarks ``[B, heads, m, d]``.

        ``present`` is of landmarks by content, ``landmark_mask`` and ``scale`` of released ones.
        ``mask`` is ``[B, N]`` or, of landmarks by content in an image, what is inside. Padding is
        finite; what is given to it means nothing.
        """
        q, v = self._heads(q), self._heads(v)
        if self.by_content:
            there = TokenMask(all_if_none(mask)) if isinstance(mask, Tensor) else mask
            out = attend_landmarks(q, v, landmarks, present, there)
        else:
            assert not isinstance(mask, Inside)  # which released landmarks are not told of
            out = softmax_free_attention(
                q,
                v,
                landmarks,
                mask=mask,
                landmark_mask=landmark_mask,
                normalize=self.normalize,
                solver=self.solver,
                steps=self.newton_steps,
                scale=scale,
            )
        return out.transpose(1, 2).flatten(2)


class SoftmaxAttention(TakesPadding, nn.Module):
    """Ordinary multi-head self-attention over a class token and a grid of tokens (stage 4).

    Args:
        embed_dims: channels ``C``.
        num_heads: heads.
        drop_rate: dropout after the projection.
        max_keys: limit of the number of keys, which makes the cost linear: a grid of tokens that
            exceeds ``isqrt(max_keys)`` rows or columns is averaged down to them for keys and
            values. ``None`` for no limit.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        drop_rate: float = 0.0,
        max_keys: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.max_keys = max_keys
        self.query = nn.Linear(embed_dims, embed_dims)
        self.key_value = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, max_keys={self.max_keys}"

    def forward(self, x: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None) -> Tensor:
        """Attend from all tokens of ``x [B, 1 + H*W, C]``, class token first.

        Those that are not ``inside`` are no keys.
        """
        keys, bias = self._keys(x, hw_shape, inside)
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.query(x), *self.key_value(keys).chunk(2, -1))
        )
        out = softmax_attention(q, k, v, bias, scale=q.shape[-1] ** -0.5).transpose(1, 2)
        if bias is not None and traced(out):
            # With a bias torch.export later takes another form, whose result lies otherwise.
            out = out.clone(memory_format=torch.contiguous_format)
        return self.drop(self.proj(out.flatten(2)))

    def _keys(
        self, x: Tensor, hw_shape: tuple[int, int], inside: Inside | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens that keys are made from, and what their number adds to the logits."""
        (height, width), side = hw_shape, math.isqrt(self.max_keys or 0)
        # A program of torch.export for any size is on both sides of the limit.
        known = not isinstance(height, torch.SymInt) and not isinstance(width, torch.SymInt)
        if self.max_keys is None or (known and height <= side and width <= side):
            return x, None if inside is None else inside.bias(x.dtype, 1)
        rows, cols = smaller(height, side), smaller(width, side)
        image = x[:, 1:]
        if inside is not None:  # as a channel more, in the memory of tokens: torch.export would
            last = inside.numbers(x.dtype)[:, :, None]  # tell sizes apart for one in that of images
            image = torch.cat((image.masked_fill(inside.padding()[:, :, None], 0), last), 2)
        image = image.transpose(1, 2)
        image = _pooled(image.unflatten(2, hw_shape), rows, cols).flatten(2)
        # A mean stands for several tokens: so many times its exponential enters the softmax.
        tokens = x.new_full((1, 1, 1, image.shape[2] + 1), height * width / (rows * cols))
        tokens[..., 0] = 1
        if inside is not None:
            share = image[:, -1:]
            image = image[:, :-1] / share.clamp(min=torch.finfo(share.dtype).tiny)
            tokens = tokens * F.pad(share, (1, 0), value=1.0)[:, :, None]
        keys = torch.cat((x[:, :1], image.transpose(1, 2)), 1)
        return keys, tokens.log()
