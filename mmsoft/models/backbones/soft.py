"""The SOFT and SOFT++ backbones."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsoft.checkpoint import check_arch, check_is_ours, check_tensors
from mmsoft.ops.checks import SOLVERS
from mmsoft.ops.library import autocast_enabled, check_float16
from mmsoft.ops.mode import may_decide
from mmsoft.registry import MODELS

from ..attention import SoftmaxAttention, SoftmaxFreeAttention
from ..layers import ConvNormAct, PatchEmbed, SOFTBlock, SoftmaxBlock, Stage, as_image, stem
from ..norms import NormKind, become
from ..padding import Inside, inside
from .arch import (
    STAGES,
    STRIDES,
    check_choice,
    check_img_size,
    check_int,
    check_out_indices,
    check_rate,
    resolve_arch,
)
from .base import Backbone


@MODELS.register_module()
class SOFT(Backbone):
    """SOFT: Softmax-free Transformer with Linear Complexity (arXiv 2110.11945).

    Stages 1 to 3 are post-norm blocks of softmax-free attention, stage 4 has ordinary attention and
    a class token. :class:`SOFTPlusPlus` is the variant made for dense prediction.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, ``'huge'``, their initials, or a
            dict (see :func:`resolve_arch`). Defaults to ``'tiny'``.
        img_size: (height, width) or side in pixels for which position embeddings are kept; they are
            resized to whatever comes in. 224 in the release.
        in_channels: channels of the image.
        out_indices: stages whose features are returned, of 0 to 3. Later stages are not built.
        out_type: ``'featmap'`` for ``[B, C, H, W]`` of each stage in ``out_indices``;
            ``'cls_token'`` for the class token ``[B, C]`` (``out_indices`` must be ``(3,)``).
        max_landmarks: keep at most this many landmarks, which makes the cost linear. 49 changes
            nothing up to 224x224. ``None`` lets them grow with the image, as released (the cost of
            the inverse then grows with their cube).
        max_keys: limit of the number of keys in stage 4, whose attention is otherwise quadratic; a
            larger grid is averaged for keys and values. 2048 changes nothing up to 1440x1440.
            ``None`` for no limit, as released.
        solver: ``'newton'`` or ``'direct'``, see :func:`mmsoft.ops.softmax_free_attention`.
        newton_steps: Newton-Raphson steps, part of the model; 20 in the release.
        landmarks: ``'content'``, landmarks among the queries, of which those are kept that explain
            the others, without an inverse; or ``'released'``. See
            :meth:`~mmsoft.models.attention.SoftmaxFreeAttention.sample_landmarks`. Weights switch a
            backbone to the landmarks that they were trained with, and the log says so. ``None`` is
            ``'content'`` for SOFT++, and for SOFT ``'released'``, the only ones it has.
        landmark_sampling: ``'conv'`` or ``'avg'``.
        attn_init: initial scale of the attention when training from scratch: ``'balanced'``, of the
            order of the values' convolution at every resolution, or ``'released'``, nearly silent
            at first. Loaded weights are not affected.
        drop_rate: dropout after position embeddings, projections and MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        frozen_stages: freeze the stem (0) or the first n stages (n >= 1); -1 for nothing.
        norm_eval: keep BatchNorm, if there is any, in evaluation mode while training. Needs trained
            statistics, hence loaded weights; otherwise it would normalize nothing, of which the log
            warns.
        norm_cfg: norm of the patch embeddings' convolutions, e.g. ``dict(type='SyncBN')``. ``None``
            is GroupNorm of up to 16 groups in the first, which takes the contrast of the image
            out, and LayerNorm of each pixel in the others, until weights are loaded that were
            trained with another, as released ones with BatchNorm.
        ignore_padding: whether landmarks by content, stage 4's keys beside them, and the default
            norm are of the images alone, not of what fills up a batch; see
            :func:`mmsoft.models.padding.inside`.
        with_cp: gradient checkpointing of every block.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or ``None``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    normalize = False
    variant = "SOFT"

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_type: str = "featmap",
        max_landmarks: int | None = 49,
        max_keys: int | None = 2048,
        solver: str = "newton",
        newton_steps: int = 20,
        landmarks: str | None = None,
        landmark_sampling: str = "conv",
        attn_init: str = "balanced",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: dict | None = None,
        ignore_padding: bool = True,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        self.arch_settings = resolve_arch(arch)
        self.out_indices = check_out_indices(out_indices, out_type)
        self.out_type = out_type
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.ignore_padding = ignore_padding
        self._norm_by_weights = norm_cfg is None
        self._statistics_checked = False
        check_choice("solver", solver, SOLVERS)
        if landmarks is None:
            landmarks = "content" if self.normalize else "released"
        check_choice("landmarks", landmarks, ("content", "released"))
        check_choice("landmark_sampling", landmark_sampling, ("conv", "avg"))
        check_choice("attn_init", attn_init, ("balanced", "released"))
        check_int("in_channels", in_channels, 1)
        check_int("newton_steps", newton_steps, 1)
        check_int("frozen_stages", frozen_stages, -1, STAGES)
        for name, budget in (("max_landmarks", max_landmarks), ("max_keys", max_keys)):
            if budget is not None:
                check_int(name, budget, 1)
        check_rate("drop_rate", drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        for name, flag in (
            ("norm_eval", norm_eval),
            ("ignore_padding", ignore_padding),
            ("with_cp", with_cp),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        size = check_img_size(img_size)
        dims, depths = self.arch_settings["embed_dims"], self.arch_settings["depths"]
        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i in range(max(self.out_indices) + 1):
            for _ in range(2 if i == 0 else 1):
                size = (_halve(size[0]), _halve(size[1]))
            common: dict[str, Any] = dict(
                embed_dims=dims[i],
                num_heads=self.arch_settings["num_heads"][i],
                drop_rate=drop_rate,
            )
            is_last = i == STAGES - 1
            block: Callable[..., nn.Module]
            build: Callable[..., nn.Module]
            if is_last:
                block, build = SoftmaxBlock, SoftmaxAttention
                options = dict[str, Any](max_keys=max_keys)
            else:
                block, build = SOFTBlock, self.build_attention
                options = dict[str, Any](
                    landmark_stride=self.arch_settings["landmark_strides"][i],
                    value_kernel=self.arch_settings["value_kernels"][i],
                    normalize=self.normalize,
                    max_landmarks=max_landmarks,
                    landmarks=landmarks,
                    landmark_sampling=landmark_sampling,
                    attn_init=attn_init,
                    solver=solver,
                    newton_steps=newton_steps,
                )
            blocks = [
                block(dims[i], build(**common, **options), rate, drop_rate)
                for rate in drop_path[sum(depths[:i]) : sum(depths[: i + 1])]
            ]
            if i == 0:
                patch_embed = stem(in_channels, dims[0], norm_cfg)
            else:
                patch_embed = PatchEmbed(ConvNormAct(dims[i - 1], dims[i], 2, norm_cfg))
            self.stages.append(
                Stage(patch_embed, blocks, dims[i], size, is_last, drop_rate, with_cp)
            )
        if len(self.stages) == STAGES:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self._initialize()
        self._foresee_weights()
        self._freeze()

    def build_attention(self, **options: Any) -> nn.Module:
        """Build the attention of one block of stages 1 to 3: what to override for another one.

        Args:
            options: those of :class:`~mmsoft.models.attention.SoftmaxFreeAttention`.

        Returns:
            A module called as ``attn(tokens [B, H*W, C], (H, W))``, which returns ``[B, H*W, C]``;
            what it is called with where there is padding, :class:`mmsoft.models.padding.Inside`
            tells.
        """
        return SoftmaxFreeAttention(**options)

    def _initialize(self) -> None:
        """Initialize for training from scratch; ``init_cfg`` may load weights over this later."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                # He initialization by the fan-out of one group, unlike nn.init.kaiming_normal_.
                fan_out = module.weight.shape[0] * module.weight[0, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Stage):
                nn.init.trunc_normal_(module.pos_embed, std=0.02)
                if module.cls_token is not None:
                    nn.init.trunc_normal_(module.cls_token, std=0.02)
        self._init_queries()

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        """Refuse a checkpoint of another backbone, architecture or variant: MMEngine only logs it.

        A state dict with only a few of our parameters is left to its author; with none it may be a
        mistake, which is logged.
        """
        own = self._own_tensors()
        whole = f"{prefix}stages.0.pos_embed" in state_dict
        none = not any(prefix + name in state_dict for name in own)
        check_tensors(state_dict, prefix, own)
        if whole:
            check_arch(state_dict, prefix, self.arch_settings, len(self.stages))
        else:
            statistics = [
                f"{name}.norm.{key}" for name in self._patch_convs() for key in STATISTICS
            ]
            check_is_ours(state_dict, prefix, [*own, *statistics], self.variant)
        self._match_variant(local_metadata)
        self.match_weights(state_dict, prefix, local_metadata)
        if whole:
            self._compare_inverse(local_metadata)
        if whole or none:  # after the switch, because landmarks by content are among the tensors
            self._note_loading(state_dict, prefix, self._own_tensors(), *args[1:])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def match_weights(self, state_dict: dict, prefix: str, local_metadata: dict) -> None:
        """Become the backbone for which weights were trained: its landmarks, and its norms."""
        super().match_weights(state_dict, prefix, local_metadata)
        noted = local_metadata.get("patch_norms")
        self._match_norms(state_dict, prefix, noted if isinstance(noted, dict) else {})

    def notes(self) -> dict[str, Any]:
        """Also, for every norm of the patch embeddings, what its tensors do not tell."""
        kinds = {name: NormKind.of(layer.norm) for name, layer in self._patch_convs().items()}
        patch_norms = {name: tuple(kind) for name, kind in kinds.items() if kind is not None}
        return dict(super().notes(), patch_norms=patch_norms)

    def _match_norms(self, state_dict: dict, prefix: str, noted: dict) -> None:
        """Weights decide about the norms of patch embeddings, unless ``norm_cfg`` has."""
        layers = self._patch_convs().items()
        given = {
            name: layer for name, layer in layers if f"{prefix}{name}.norm.weight" in state_dict
        }
        # One is enough: then none of the others may be missing.
        of_batch = any(f"{prefix}{name}.norm.running_mean" in state_dict for name in given)
        changed, unlike = [], []
        for name, layer in given.items():
            norm: Any = layer.norm
            kind = NormKind.noted(noted.get(name))
            if not self._norm_by_weights:
                unlike += [kind] if kind not in (None, NormKind.of(norm)) else []
            elif become(norm, of_batch, kind, layer.of_image):
                changed.append(NormKind.of(norm))
            if self.norm_eval and isinstance(norm, _BatchNorm):
                norm.eval()
        if changed:
            advice = ""
            if of_batch and not self.norm_eval:
                advice = "; norm_eval=True keeps its statistics where images on a GPU are few"
                if get_world_size() > 1:
                    advice += ", norm_cfg=dict(type='SyncBN') takes those of all GPUs"
            print_log(
                f"{type(self).__name__}: the weights were trained with {changed[0]} in the patch "
                f"embeddings, which is used from now on{advice}",
                logger="current",
            )
        if unlike:
            print_log(
                f"{type(self).__name__}: the weights were trained with {unlike[0]} in the patch "
                "embeddings, norm_cfg has another norm",
                logger="current",
                level=logging.WARNING,
            )

    def _patch_convs(self) -> dict[str, ConvNormAct]:
        return {name: m for name, m in self.named_modules() if isinstance(m, ConvNormAct)}

    def _frozen_modules(self) -> list[nn.Module]:
        frozen: list[nn.Module] = list(self.stages[: max(self.frozen_stages, 0)])
        if self.frozen_stages == 0:
            frozen.append(self.stages[0].get_submodule("patch_embed"))
        if self.frozen_stages == STAGES == len(self.stages):
            frozen.append(self.norm)
        return frozen

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)
        if self.frozen_stages == 0:
            self.stages[0].get_parameter("pos_embed").requires_grad_(False)

    def train(self, mode: bool = True) -> "SOFT":
        """Switch mode, keeping frozen stages, and with ``norm_eval`` BatchNorm, in evaluation.

        The first time, warn if the statistics of such a BatchNorm are the initial ones.
        """
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
            if not self._statistics_checked:
                self._statistics_checked = True
                self._warn_of_initial_statistics()
        return self

    def _warn_of_initial_statistics(self) -> None:
        norms = [
            name
            for name, module in self.named_modules()
            if isinstance(module, _BatchNorm) and not module.training and _is_untouched(module)
        ]
        if norms:
            why = "norm_eval=True" if self.norm_eval else f"frozen_stages={self.frozen_stages}"
            print_log(
                f"{type(self).__name__}: {why} keeps BatchNorm in evaluation mode, but "
                f"{len(norms)} of them ({norms[0]}, ...) have the initial statistics, mean 0 and "
                "variance 1, and so do not normalize. Load trained weights "
                "(init_cfg=dict(type='Pretrained', checkpoint=...)). Or train from scratch without "
                "norm_cfg, whose norms then need no statistics, or with "
                "norm_eval=False and frozen_stages=-1.",
                logger="current",
                level=logging.WARNING,
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute features.

        Args:
            x: images ``[B, in_channels, H, W]`` of any size.

        Returns:
            One tensor per entry of ``out_indices``: ``[B, C_i, ceil(H/s), ceil(W/s)]`` with s = 4,
            8, 16, 32; or the class token ``[B, C_4]``. All are contiguous.

        Raises:
            TypeError, ValueError: ``x`` is not a batch of images, or not of the model's dtype; or
                that is float16, on a CPU, and torch is older than 2.3.
        """
        self._check_images(x)
        size: tuple[int, int] | None = None
        # Stage 4 does not count: it leaves out what another layer has been told of.
        layers = self._leaving_padding_out(self.stages[: STAGES - 1]) if self.ignore_padding else ()
        within = inside(x) if any(layers) else None
        if within is not None and may_decide(x) and all(self._leaving_padding_out(self.stages)):
            size = (x.shape[2], x.shape[3])
            within, (height, width) = within.cropped()  # nothing depends on what is cut off
            x = x[:, :, :height, :width]
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        # Strides at hand: torch 2.4 compiles no shift by an index that it has made a variable of.
        for i, (stage, stride) in enumerate(zip(self.stages, STRIDES)):
            padding: tuple[Inside, ...] = ()
            if within is not None:
                of_pixels, within = within, within.every(2 if i else 4)
                padding = (within, of_pixels)
            tokens, hw_shape = stage(x, *padding)
            if stage.cls_token is not None:
                tokens = self.norm(tokens)
                if self.out_type == "cls_token":
                    return (tokens[:, 0].contiguous(),)
                tokens = tokens[:, 1:]
            if i in self.out_indices:
                outs.append(_fill_up(as_image(tokens, hw_shape), size, stride, within))
            x = tokens.unflatten(1, hw_shape).permute(0, 3, 1, 2)  # a channels-last view
        return tuple(outs)

    def _leaving_padding_out(self, stages: Any) -> Iterator[bool]:
        """Of each layer that reads from more than a pixel, whether it does so.

        Released landmarks and BatchNorm do not, as released.
        """
        for stage in stages:
            for layer in (stage.patch_embed, *(block.attn for block in stage.blocks)):
                yield getattr(layer, "leaves_padding_out", False)

    def _check_images(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"x must be [B, {self.in_channels}, H, W] with at least one pixel, "
                f"got shape {tuple(x.shape)}"
            )
        stage: Any = self.stages[0]
        dtype = stage.pos_embed.dtype
        autocast = not x.is_meta and autocast_enabled(x.device.type)
        if x.dtype != dtype and not (autocast and x.is_floating_point()):
            raise TypeError(f"x must be {dtype}, as the weights, got {x.dtype}")
        check_float16(dtype, x.device.type)

    def extra_repr(self) -> str:
        return (
            f"out_indices={self.out_indices}, out_type={self.out_type}, "
            f"drop_path_rate={self.drop_path_rate}, frozen_stages={self.frozen_stages}, "
            f"norm_eval={self.norm_eval}"
        )

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: its name.
            prefix: what precedes the backbone's own names, e.g. ``'backbone.'``.

        Returns:
            ``(depth, num_layers)``: 0 for the stem, 1 for the first block, ``num_layers - 1`` for
            the final norm and whatever is not in the backbone. A later stage's embeddings belong
            to its first block.
        """
        depths = self.arch_settings["depths"]
        num_layers = sum(depths) + 2
        name = param_name.removeprefix(prefix)
        parts = name.split(".")
        if not param_name.startswith(prefix) or parts[0] != "stages":
            return num_layers - 1, num_layers
        stage = int(parts[1])
        if parts[2] == "blocks":
            return sum(depths[:stage]) + int(parts[3]) + 1, num_layers
        return (sum(depths[:stage]) + 1 if stage else 0), num_layers


@MODELS.register_module()
class SOFTPlusPlus(SOFT):
    """SOFT++: Softmax-free Linear Transformers (arXiv 2207.03341).

    :class:`SOFT` with symmetric normalization of the attention matrix, which lets weights trained
    at 224x224 transfer to the long sequences of detection and segmentation. Same arguments.
    """

    normalize = True
    variant = "SOFT++"


def _fill_up(
    image: Tensor, size: tuple[int, int] | None, stride: int, within: Inside | None
) -> Tensor:
    """Features with 0 where there is padding, at a stride of the ``size`` that was cropped."""
    if within is not None:
        image = image.masked_fill_(within.outside()[:, None], 0)
    if size is None:
        return image
    height, width = (-(-side // stride) for side in size)
    return F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _is_untouched(norm: _BatchNorm) -> bool:
    """Whether no batch has passed and nothing was loaded."""
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or batches is None or mean.is_meta:
        return False
    return not bool(batches.any() | mean.any() | (var != 1).any())


def _halve(size: int) -> int:
    return (size + 1) // 2  # a 3x3 convolution of stride 2 and padding 1
