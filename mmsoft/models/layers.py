"""Patch embeddings, the two kinds of block, and the stage that joins them."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mmsoft.ops.island import compute_dtype, matmul
from mmsoft.ops.linear import fused_dtype, fused_linear
from mmsoft.ops.mode import cpu_shortcut, is_ordinary, traced, transformed

from .attention import SoftmaxFreeAttention
from .norms import OURS, build_norm
from .padding import Inside
from .plain import is_hooked, is_plain

_FOLDABLE_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


class ConvNormAct(nn.Sequential):
    """3x3 convolution (with bias, as released), norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm_cfg: dict | None,
        of_image: bool = False,
    ):
        super().__init__()
        self.stride = stride  # known whatever takes the convolution's place
        self.of_image = of_image
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = build_norm(norm_cfg, out_channels, of_image)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """``[B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]``.

        ``inside`` tells which of the result's pixels are not padding.
        """
        if not self._foldable(x):
            padding = () if inside is None or not isinstance(self.norm, OURS) else (inside,)
            in_place = self._owns_result(x)
            x = self._convolve(self.conv, x)
            norm: Any = self.norm
            if in_place:
                return norm.relu_(x, *padding)
            x = norm(x, *padding)
            # The ReLU overwrites what a hook may have kept.
            return self.act(x.clone() if is_hooked(self.norm) else x)
        conv: Any = self.conv
        weight, bias = self._folded()
        return self.act(self._convolve(lambda x: conv._conv_forward(x, weight, bias), x))

    def _folded(self) -> tuple[Tensor, Tensor]:
        """A frozen norm as part of the convolution: one pass over the image less."""
        conv: Any = self.conv
        norm: Any = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        return conv.weight * scale[:, None, None, None], bias

    def _owns_result(self, x: Tensor) -> bool:
        """Whether norm and ReLU may overwrite what the convolution gives."""
        return (
            cpu_shortcut(x)
            and not transformed()
            and is_ordinary(x)
            and is_plain(self.conv, nn.Conv2d.forward)
            and is_plain(self.norm, *(norm.forward for norm in OURS))
            and self.norm.weight is not None
            and is_plain(self.act, nn.ReLU.forward)
        )

    def _convolve(self, convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        conv: Any = self.conv
        if (
            cpu_shortcut(x)
            and is_plain(conv, nn.Conv2d.forward)
            and conv.weight.numel() > 4 * x.numel()
            and conv.weight.is_contiguous()
            and not x.is_contiguous()
        ):
            # torch copies a weight to the layout of the image, although it is much the larger
            return convolution(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return convolution(x)

    def _foldable(self, x: Tensor) -> bool:
        norm = self.norm
        # A compiler fuses the norm itself. On few pixels it costs less than a new weight.
        if traced(x) or x[:, 0].numel() < 9 * x.shape[1]:
            return False
        if not is_plain(self.conv, nn.Conv2d.forward) or not is_plain(norm, *_FOLDABLE_NORMS):
            return False
        return not norm.training and bool(norm.affine) and norm.running_mean is not None


class PatchEmbed(nn.Sequential):
    """Convolutions with stride, norm and ReLU.

    In evaluation on a CPU, with norms that are folded into the convolutions, large images between
    them exist a band of rows of a sample at a time, which stays in the caches: fresh memory is
    expensive.
    """

    band_elements = 1 << 19  # of an image between the convolutions
    of_images = False

    @property
    def leaves_padding_out(self) -> bool:
        """Whether it matters what is inside, and nothing else does."""
        return all(isinstance(x, ConvNormAct) and isinstance(x.norm, OURS) for x in self)

    def forward(self, x: Tensor, inside: Inside | None = None) -> Tensor:
        """``[B, C_in, H, W] -> [B, C, ceil(H / s), ceil(W / s)]``, s the product of strides.

        Beyond what is ``inside`` on the grid of ``x`` convolutions meet zeros, as beyond the
        border.
        """
        if inside is not None and self.leaves_padding_out:
            if not self.of_images:  # whose padding is 0 by definition
                x = x.masked_fill(inside.outside()[:, None], 0)
            layers: list[Any] = list(self)
            for layer in layers:
                inside = inside.every(layer.stride)
                x = layer(x, inside)
            return x
        if not self._takes_bands(x):
            return super().forward(x)
        layers = list(self)
        folded = [layer._folded() for layer in layers]
        heights = [x.shape[2]]
        for layer in layers:
            heights.append((heights[-1] - 1) // layer.conv.stride[0] + 1)

        def rows_of(depth: int, sample: int, first: int, last: int) -> Tensor:
            """Rows of what so many layers give."""
            if depth == 0:
                return x[sample : sample + 1, :, first:last]
            layer = layers[depth - 1]
            stride, height = layer.conv.stride[0], heights[depth - 1]
            above, below = first * stride - 1, (last - 1) * stride + 2
            rows = rows_of(depth - 1, sample, max(above, 0), min(below, height))
            if above < 0 or below > height:
                rows = F.pad(rows, (0, 0, max(-above, 0), max(below - height, 0)))
            weight, bias = folded[depth - 1]
            return layer.act(F.conv2d(rows, weight, bias, stride, (0, 1)))

        step = max(1, heights[-1] * self.band_elements // self._between(x))
        out = None
        for sample in range(len(x)):
            for first in range(0, heights[-1], step):
                last = min(first + step, heights[-1])
                band = rows_of(len(layers), sample, first, last)
                if out is None:  # the first tells the dtype: autocast decides
                    size = (len(x), band.shape[1], heights[-1], band.shape[3])
                    like: Any = dict(dtype=band.dtype, device=band.device)
                    out = torch.empty(size, **like, memory_format=torch.channels_last)
                out[sample, :, first:last] = band[0]
        assert out is not None
        return out

    def _between(self, x: Tensor) -> int:
        """Numbers that a sample has between the first two convolutions, at least 1."""
        first: Any = self[0]
        return max(1, first.conv.out_channels * x.shape[2] * x.shape[3] // 4)

    def _takes_bands(self, x: Tensor) -> bool:
        if not cpu_shortcut(x) or transformed() or not is_ordinary(x) or len(self) < 2:
            return False
        layers: list[Any] = list(self)
        if any(map(is_hooked, self.modules())) or not all(
            is_plain(layer, ConvNormAct.forward)
            and is_plain(layer.act, nn.ReLU.forward)
            and layer._foldable(x)
            and _is_3x3(layer.conv)
            for layer in layers
        ):
            return False
        enough = len(x) * self._between(x) > 2 * self.band_elements
        return enough and x.shape[1] == layers[0].conv.in_channels


def _is_3x3(conv: nn.Conv2d) -> bool:
    sides = (conv.kernel_size, conv.padding, conv.dilation)
    square = conv.stride[0] == conv.stride[1] and conv.groups == 1
    return square and sides == ((3, 3), (1, 1), (1, 1)) and conv.padding_mode == "zeros"


def stem(in_channels: int, embed_dims: int, norm_cfg: dict | None) -> PatchEmbed:
    """Three convolutions to stride 4, through 32 channels."""
    layers = PatchEmbed(
        ConvNormAct(in_channels, 32, 2, norm_cfg, of_image=True),
        ConvNormAct(32, 32, 1, norm_cfg),
        ConvNormAct(32, embed_dims, 2, norm_cfg),
    )
    layers.of_images = True
    return layers


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize position embeddings ``[1, h*w, C]`` of a ``grid`` (h, w) bilinearly to ``target``."""
    image = pos_embed.unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def pos_embed_inside(pos_embed: Tensor, grid: tuple[int, int], inside: Inside) -> Tensor:
    """Resize position embeddings ``[1, h*w, C]`` of a ``grid`` to what is inside, of each sample.

    Returns:
        ``[B, H*W, C]``; there :func:`resize_pos_embed`'s, beyond that its border continued.
    """
    image = pos_embed.to(compute_dtype(pos_embed)).unflatten(1, grid)  # [1, h, w, C]
    rows, cols = (_weights(along, size, image) for along, size in zip(inside, grid))
    # Products of one batch dimension each, whose shapes torch.export can follow for any size.
    image = image.transpose(1, 2).flatten(2).expand(cols.shape[0], -1, -1)
    image = matmul(cols, image).unflatten(2, (grid[0], -1))  # [B, W, h, C]
    image = matmul(rows, image.transpose(1, 2).flatten(2))  # [B, H, W * C]
    return image.reshape(rows.shape[0], rows.shape[1] * cols.shape[1], pos_embed.shape[2])


def _weights(inside: Tensor, size: int, like: Tensor) -> Tensor:
    """Of bilinear interpolation from ``size`` points to those ``inside``, ``[B, n, size]``."""
    options: dict[str, Any] = dict(dtype=like.dtype, device=like.device)
    place = (torch.arange(inside.shape[1], **options) + 0.5) * size  # exact
    place = place / inside.sum(1, keepdim=True, dtype=like.dtype)
    away = place.clamp(0.5, size - 0.5)[..., None] - torch.arange(0.5, size, **options)
    return (1 - away.abs()).clamp(min=0)


def as_image(tokens: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """Copy tokens ``[B, H*W, C]`` to an image ``[B, C, H, W]`` with the strides of a new tensor.

    Contiguous, because operators of mmcv such as RoIAlign read raw memory without asking for the
    strides of what they get.
    """
    layout = torch.contiguous_format
    if cpu_shortcut(tokens, backward=True) and len(tokens) > 0:
        # torch transposes a matrix in blocks, three times as fast as it permutes a batch
        images = [matrix.mT.clone(memory_format=layout) for matrix in tokens]
        image = torch.stack(images) if len(images) > 1 else images[0][None]
        return image.unflatten(2, hw_shape)
    # A copy and then a view, as above, of any height and width is more than Inductor can order.
    return tokens.unflatten(1, hw_shape).permute(0, 3, 1, 2).clone(memory_format=layout)


class TanhGELU(nn.GELU):
    """GELU in its tanh approximation, ``x (1 + tanh u) / 2``.

    In evaluation on a CPU that is computed as ``x sigmoid(2u)``, in half the time: torch's tanh
    takes longer than the passes over memory. With a backward pass its own operator stores less.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; not in place."""
        if not cpu_shortcut(x) or x.dtype != torch.float32:
            return super().forward(x)
        factor = 2 * math.sqrt(2 / math.pi)
        twice_u = torch.addcmul(x.new_tensor(factor), x, x, value=0.044715 * factor).mul_(x)
        return twice_u.sigmoid_().mul_(x)


class Mlp(nn.Sequential):
    """Linear, an activation, linear, with ``4 * embed_dims`` hidden channels by default."""

    def __init__(
        self, embed_dims: int, act: nn.Module, drop_rate: float, hidden_dims: int | None = None
    ):
        hidden_dims = hidden_dims or 4 * embed_dims
        super().__init__(
            nn.Linear(embed_dims, hidden_dims),
            act,
            nn.Dropout(drop_rate),
            nn.Linear(hidden_dims, embed_dims),
            nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        dtype = self._fused_dtype(x)
        if dtype is None:
            return super().forward(x)
        first, act, drop, last, last_drop = self._layers()
        hidden = fused_linear(x, first.weight, first.bias, act.approximate, dtype=dtype)
        return last_drop(fused_linear(drop(hidden), last.weight, last.bias, dtype=dtype))

    def _layers(self) -> Iterator[Any]:
        return iter(self)

    def _fused_dtype(self, x: Tensor) -> torch.dtype | None:
        if not cpu_shortcut(x) or len(self) != 5:
            return None
        first, act, _, last, _ = self._layers()
        linear, gelu = nn.Linear.forward, (nn.GELU.forward, TanhGELU.forward)
        if not (is_plain(first, linear) and is_plain(act, *gelu) and is_plain(last, linear)):
            return None
        # A parametrized weight may count how often it is asked for.
        if is_parametrized(first) or is_parametrized(last) or x.shape[-1] != first.in_features:
            return None
        return fused_dtype(x, first.weight, first.bias, last.weight, last.bias)


class _Block(nn.Module):
    """What the two kinds of block share.

    Args:
        embed_dims: channels ``C``.
        attn: called as ``attn(tokens [B, N, C], (H, W))``, returns ``[B, N, C]``; where there is
            padding, with :class:`~mmsoft.models.padding.Inside` too, if it has ``takes_padding``.
        drop_path: rate of stochastic depth.
        drop_rate: dropout in the MLP.
    """

    part_elements = 1 << 18  # of the tokens treated at once, in evaluation on a CPU
    attn: nn.Module

    def _padding(self, inside: Inside | None) -> tuple[Inside, ...]:
        """The last argument for ``attn``, if it takes one: another's attention may not."""
        if inside is None or not getattr(self.attn, "takes_padding", False):
            return ()
        return (inside,)

    def tokenwise(self, function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
        """``function(*tokens)`` of ``[B, N, C]`` each, where no token's result needs another's.

        In evaluation on a CPU tokens take their turn in parts that fit its caches. That is faster,
        because fresh memory is expensive (a third of the time of a block at 4096x4096), and the
        hidden activations never exist as a whole. With a backward pass they all have to be kept.
        A hook sees all tokens at once.
        """
        x = tokens[0]
        if not self._takes_parts(x):
            return function(*tokens)
        out = self._by_part([function], *(t.flatten(0, 1)[None] for t in tokens))
        return out.view(*x.shape[:2], -1)

    def _takes_parts(self, x: Tensor, of_samples: bool = False) -> bool:
        if self.training or not cpu_shortcut(x):  # before any size is looked at: it may be traced
            return False
        elements = x.numel() // max(len(x), 1) if of_samples else x.numel()
        return elements > self.part_elements and not any(map(is_hooked, self.modules()))

    def _by_part(self, functions: list[Callable[..., Tensor]], *tokens: Tensor) -> Tensor:
        """The function of each sample, of a part of its tokens at a time."""
        x = tokens[0]
        rows = max(1, self.part_elements // x.shape[-1])
        out = None
        for sample, function in enumerate(functions):
            done = 0
            for part in zip(*(t[sample : sample + 1].split(rows, 1) for t in tokens)):
                result = function(*part)
                if out is None:  # the first tells the dtype: autocast decides
                    out = result.new_empty((*x.shape[:2], result.shape[2]))
                out[sample, done : done + result.shape[1]] = result[0]
                done += result.shape[1]
        assert out is not None
        return out


class SOFTBlock(_Block):
    """Post-norm block of stages 1 to 3: ``x = LN(x + attn(x))``, ``x = LN(x + mlp(x))``."""

    def __init__(self, embed_dims: int, attn: nn.Module, drop_path: float, drop_rate: float):
        super().__init__()
        self.attn = attn
        self.norm1 = nn.LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, TanhGELU(), drop_rate)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], inside: Inside | None = None) -> Tensor:
        """``[B, H*W, C] -> [B, H*W, C]``; ``inside`` tells what is not padding."""
        padding = self._padding(inside)
        if not self._attends_by_part(x):
            return self.tokenwise(self._after_attention, x, self.attn(x, hw_shape, *padding))
        attn: Any = self.attn
        functions, *tokens = attn.by_token(x, hw_shape, *padding)
        return self._by_part([partial(self._complete, f) for f in functions], x, *tokens)

    def _attends_by_part(self, x: Tensor) -> bool:
        """Whether what the tokens read from landmarks, too, never exists as a whole."""
        if not self._takes_parts(x, of_samples=True):
            return False
        attn: Any = self.attn
        if type(attn) is not SoftmaxFreeAttention or not attn.by_content:
            return False
        changed = {"attend", "operate"} & vars(attn).keys()
        return not changed and is_plain(attn, SoftmaxFreeAttention.forward)

    def _complete(self, attention: Callable[..., Tensor], x: Tensor, *tokens: Tensor) -> Tensor:
        return self._after_attention(x, attention(*tokens))

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.drop_path(attended))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class SoftmaxBlock(_Block):
    """Pre-norm block: of stage 4, with ordinary attention, and of sequences.

    There the second argument is not the grid but the mask of the tokens, which goes to ``attn``.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: nn.Module,
        drop_path: float,
        drop_rate: float,
        hidden_dims: int | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, nn.GELU(), drop_rate, hidden_dims)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, where: tuple[int, int] | Tensor | None, inside: Inside | None = None
    ) -> Tensor:
        """``[B, N, C] -> [B, N, C]``; ``where`` is the grid (H, W), or the mask ``[B, N]``."""
        attended = self.attn(self.norm1(x), where, *self._padding(inside))
        return self.tokenwise(self._after_attention, x, attended)

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _save_pos_grid(module: "Stage", state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Note the grid beside the state dict, in the metadata that ``load_state_dict`` hands back."""
    local_metadata["pos_grid"] = module.pos_grid


class Stage(nn.Module):
    """Patch embedding, position embedding, optional class token, blocks.

    Args:
        patch_embed: from an image ``[B, C_in, H, W]`` to ``[B, C, H', W']``.
        blocks: called as ``block(tokens, (H', W'))``.
        embed_dims: ``C``.
        pos_grid: the grid (rows, columns) for which position embeddings are kept.
        with_cls_token: prepend a class token, with its own position embedding in row 0.
        drop_rate: dropout after the position embedding.
        with_cp: recompute each block in the backward pass instead of storing its activations.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Iterable[nn.Module],
        embed_dims: int,
        pos_grid: tuple[int, int],
        with_cls_token: bool,
        drop_rate: float,
        with_cp: bool,
    ):
        super().__init__()
        self.pos_grid = pos_grid
        self.with_cp = with_cp
        self.patch_embed = patch_embed
        tokens = pos_grid[0] * pos_grid[1] + with_cls_token
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dims))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims)) if with_cls_token else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)
        self._register_state_dict_hook(_save_pos_grid)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        """Resize loaded position embeddings to our grid, then load as usual."""
        name = f"{prefix}pos_embed"
        if name in state_dict:
            loaded, n_cls = state_dict[name], int(self.cls_token is not None)
            grid = self._loaded_grid(local_metadata.get("pos_grid"), loaded.shape[1] - n_cls, name)
            if grid != self.pos_grid:
                tokens = resize_pos_embed(loaded[:, n_cls:].float(), grid, self.pos_grid)
                state_dict[name] = torch.cat((loaded[:, :n_cls], tokens.to(loaded.dtype)), 1)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _loaded_grid(self, noted: Any, tokens: int, name: str) -> tuple[int, int]:
        ints = isinstance(noted, tuple) and len(noted) == 2 and all(type(n) is int for n in noted)
        if ints and min(noted) > 0 and noted[0] * noted[1] == tokens:
            return noted
        # Released files, and copies of ours that lost their metadata, do not tell their grid.
        side = math.isqrt(max(tokens, 0))
        if side and side * side == tokens:
            return side, side
        if tokens == self.pos_grid[0] * self.pos_grid[1]:
            return self.pos_grid
        raise ValueError(f"{name} must have a square grid or {self.pos_grid}, got {tokens} tokens")

    def extra_repr(self) -> str:
        return f"pos_embed={tuple(self.pos_embed.shape)}, with_cp={self.with_cp}"

    def forward(
        self, x: Tensor, inside: Inside | None = None, of_pixels: Inside | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens ``[B, (1 +) H'*W', C]`` and ``(H', W')``.

        ``inside`` tells which of the ``H' x W'`` are not padding, ``of_pixels`` which of those of
        ``x``; a patch embedding of one's own is not told.
        """
        ours = of_pixels is not None and isinstance(self.patch_embed, PatchEmbed)
        x = self.patch_embed(x, of_pixels) if ours else self.patch_embed(x)
        hw_shape = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view of channels-last memory
        pos_embed = self.pos_embed if self.cls_token is None else self.pos_embed[:, 1:]
        if inside is None:
            grid = resize_pos_embed(pos_embed, self.pos_grid, hw_shape)
        else:
            grid = pos_embed_inside(pos_embed, self.pos_grid, inside)
        # In the memory of the grid's tokens, whatever the image's is.
        x = grid.to(x.dtype) + x
        if self.cls_token is not None:
            cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat((cls_token.to(x.dtype), x), 1)
        x = self.pos_drop(x)
        more = () if inside is None else (inside,)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(
                    block, x, hw_shape, *more, use_reentrant=False
                )
            else:
                x = block(x, hw_shape, *more)
        return x, hw_shape
