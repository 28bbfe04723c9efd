"""The SOFT and SOFT++ backbones."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule, PretrainedInit, update_init_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsoft.checkpoint import check_arch, check_is_ours, check_tensors, load_backbone
from mmsoft.ops.attention import SOLVERS
from mmsoft.registry import MODELS

from ..layers import SOFTBlock, SoftmaxBlock, Stage, as_image, patch_embedding, stem

# SOFT++ (arXiv 2207.03341), table 2. Small's stage 3 has 7 blocks: the release says 20, which fits
# neither the published parameters nor those of the detectors.
ARCHS: dict[str, dict[str, list[int]]] = {
    "tiny": dict(embed_dims=[64, 128, 320, 512], depths=[1, 2, 3, 2], num_heads=[2, 4, 10, 16]),
    "small": dict(embed_dims=[64, 128, 320, 512], depths=[1, 3, 7, 4], num_heads=[2, 4, 10, 16]),
    "medium": dict(embed_dims=[64, 128, 288, 512], depths=[1, 3, 29, 5], num_heads=[2, 4, 9, 16]),
    "large": dict(embed_dims=[64, 128, 320, 512], depths=[1, 3, 40, 5], num_heads=[2, 4, 10, 16]),
    "huge": dict(embed_dims=[64, 128, 352, 512], depths=[1, 5, 49, 5], num_heads=[2, 4, 11, 16]),
}
ARCH_ALIASES = {name[0]: name for name in ARCHS}
_STAGES = 4
_OPTIONAL_ARCH = dict(landmark_strides=[8, 4, 2], value_kernels=[9, 5, 3])
_MAX_IMG_SIZE = 1 << 14  # beyond, position embeddings alone would take gigabytes
OUT_TYPES = ("featmap", "cls_token")


def resolve_arch(arch: str | dict) -> dict[str, list[int]]:
    """Look up and check an architecture.

    Args:
        arch: a name or alias of ``ARCHS``, or a dict with ``embed_dims``, ``depths``, ``num_heads``
            (4 positive integers each) and optionally ``landmark_strides``, ``value_kernels`` (3
            each, for the softmax-free stages).

    Returns:
        All five lists.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    if isinstance(arch, str):
        name = ARCH_ALIASES.get(arch.lower(), arch.lower())
        if name not in ARCHS:
            known = ", ".join(f"'{k}' ('{k[0]}')" for k in ARCHS)
            raise ValueError(f"arch '{arch}' is unknown; choose {known}, or pass a dict")
        arch = ARCHS[name]
    elif not isinstance(arch, dict):
        raise TypeError(f"arch must be a name or a dict, got {type(arch).__name__}")
    required = set(ARCHS["tiny"])
    if missing := required - set(arch):
        raise ValueError(f"arch lacks {sorted(missing)}")
    if unknown := set(arch) - required - set(_OPTIONAL_ARCH):
        raise ValueError(f"arch has unknown keys {', '.join(sorted(map(repr, unknown)))}")
    resolved = {**_OPTIONAL_ARCH, **arch}
    for key, values in resolved.items():
        length = _STAGES - 1 if key in _OPTIONAL_ARCH else _STAGES
        if not isinstance(values, (list, tuple)) or len(values) != length:
            raise ValueError(f"arch[{key!r}] must list {length} integers, got {values!r}")
        if not all(_is_int(value) and value > 0 for value in values):
            raise ValueError(f"arch[{key!r}] must hold positive integers, got {values!r}")
    for dims, heads in zip(resolved["embed_dims"], resolved["num_heads"]):
        if dims % heads:
            raise ValueError(f"arch['embed_dims'] {dims} is no multiple of its num_heads {heads}")
    if any(kernel % 2 == 0 for kernel in resolved["value_kernels"]):
        raise ValueError(f"arch['value_kernels'] must be odd, got {resolved['value_kernels']}")
    return {key: list(values) for key, values in resolved.items()}


@MODELS.register_module()
class SOFT(BaseModule):
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
        max_landmarks: keep at most this many landmarks, evenly spread; ``None`` lets them grow
            with the image, as released (the cost of the inverse then grows with their cube).
        max_keys: limit of the number of keys in stage 4, whose attention is otherwise quadratic; a
            larger grid is averaged for keys and values. 2048 leaves images up to 1440x1440 alone.
            ``None`` for no limit, as released.
        solver: ``'newton'`` or ``'direct'``, see :func:`mmsoft.ops.softmax_free_attention`.
        newton_steps: Newton-Raphson steps, part of the model; 20 in the release.
        landmark_sampling: ``'conv'`` or ``'avg'``.
        attn_init: initial scale of the attention when training from scratch: ``'balanced'``, of the
            order of the values' convolution at every resolution, or ``'released'``, nearly silent
            at first. Loaded weights are not affected.
        drop_rate: dropout after position embeddings, projections and MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        frozen_stages: freeze the stem (0) or the first n stages (n >= 1); -1 for nothing.
        norm_eval: keep BatchNorm in evaluation mode while training.
        norm_cfg: norm of the patch embeddings' convolutions, e.g. ``dict(type='SyncBN')``.
        with_cp: gradient checkpointing of every block.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or ``None``.

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
    """

    normalize = False
    variant = "SOFT"
    init_cfg: Any

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_type: str = "featmap",
        max_landmarks: int | None = None,
        max_keys: int | None = None,
        solver: str = "newton",
        newton_steps: int = 20,
        landmark_sampling: str = "conv",
        attn_init: str = "balanced",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: dict | None = None,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        _check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        self.arch_settings = resolve_arch(arch)
        self.out_indices = _check_out_indices(out_indices, out_type)
        self.out_type = out_type
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        _check_choice("solver", solver, SOLVERS)
        _check_choice("landmark_sampling", landmark_sampling, ("conv", "avg"))
        _check_choice("attn_init", attn_init, ("balanced", "released"))
        _check_int("in_channels", in_channels, 1)
        _check_int("newton_steps", newton_steps, 1)
        _check_int("frozen_stages", frozen_stages, -1, _STAGES)
        for name, budget in (("max_landmarks", max_landmarks), ("max_keys", max_keys)):
            if budget is not None:
                _check_int(name, budget, 1)
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate!r}")
        for name, flag in (("norm_eval", norm_eval), ("with_cp", with_cp)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        size = _check_img_size(img_size)
        if norm_cfg is None:
            norm_cfg = dict(type="BN")
        dims, depths = self.arch_settings["embed_dims"], self.arch_settings["depths"]
        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i in range(max(self.out_indices) + 1):
            size = (_halve(size[0]), _halve(size[1]))
            if i == 0:
                size = (_halve(size[0]), _halve(size[1]))
            common: dict[str, Any] = dict(
                embed_dims=dims[i],
                num_heads=self.arch_settings["num_heads"][i],
                drop_rate=drop_rate,
            )
            rates = drop_path[sum(depths[:i]) : sum(depths[: i + 1])]
            is_last = i == _STAGES - 1
            blocks: list[nn.Module]
            if is_last:
                blocks = [
                    SoftmaxBlock(drop_path=rate, max_keys=max_keys, **common) for rate in rates
                ]
            else:
                blocks = [
                    SOFTBlock(
                        drop_path=rate,
                        landmark_stride=self.arch_settings["landmark_strides"][i],
                        value_kernel=self.arch_settings["value_kernels"][i],
                        normalize=self.normalize,
                        max_landmarks=max_landmarks,
                        landmark_sampling=landmark_sampling,
                        attn_init=attn_init,
                        solver=solver,
                        newton_steps=newton_steps,
                        **common,
                    )
                    for rate in rates
                ]
            if i == 0:
                patch_embed = stem(in_channels, dims[0], norm_cfg)
            else:
                patch_embed = patch_embedding(dims[i - 1], dims[i], norm_cfg)
            self.stages.append(
                Stage(patch_embed, blocks, dims[i], size, is_last, drop_rate, with_cp)
            )
        if len(self.stages) == _STAGES:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self._initialise()
        self._freeze()
        self._register_state_dict_hook(_save_variant)

    def _initialise(self) -> None:
        """Initialise for training from scratch; ``init_cfg`` may load weights over this later."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                # He initialisation by the fan-out of one group, unlike nn.init.kaiming_normal_.
                fan_out = module.weight.shape[0] * module.weight[0, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Stage):
                nn.init.trunc_normal_(module.pos_embed, std=0.02)
                if module.cls_token is not None:
                    nn.init.trunc_normal_(module.cls_token, std=0.02)

    def init_weights(self) -> None:
        """Apply ``init_cfg``; ``Pretrained`` goes through :func:`mmsoft.checkpoint.load_backbone`.

        Raises:
            ValueError, RuntimeError: the checkpoint is refused or does not fit.
        """
        init_cfg, pretrained = self.init_cfg, []
        if not self.is_init and init_cfg:
            cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg
            pretrained = [cfg for cfg in cfgs if cfg["type"] in ("Pretrained", PretrainedInit)]
            self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in pretrained:
            load_backbone(self, **{key: value for key, value in cfg.items() if key != "type"})
            if hasattr(self, "_params_init_info"):
                update_init_info(self, f"loaded from {cfg['checkpoint']}")

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        """Refuse a checkpoint of another backbone, architecture or variant: MMEngine only logs it.

        A state dict with but a few of our parameters is left to whoever made it.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        check_tensors(state_dict, prefix, own)
        if f"{prefix}stages.0.pos_embed" in state_dict:
            check_arch(state_dict, prefix, self.arch_settings, len(self.stages))
        else:
            check_is_ours(state_dict, prefix, own, self.variant)
        if (variant := local_metadata.get("variant")) not in (None, self.variant):
            raise ValueError(
                f"the checkpoint is of {variant} but the config has {self.variant}; change the "
                "type of the config's backbone, or name another checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _frozen_modules(self) -> list[nn.Module]:
        frozen: list[nn.Module] = list(self.stages[: max(self.frozen_stages, 0)])
        if self.frozen_stages == 0:
            frozen.append(self.stages[0].get_submodule("patch_embed"))
        if self.frozen_stages == _STAGES == len(self.stages):
            frozen.append(self.norm)
        return frozen

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)
        if self.frozen_stages == 0:
            self.stages[0].get_parameter("pos_embed").requires_grad_(False)

    def train(self, mode: bool = True) -> "SOFT":
        """Switch mode, keeping frozen stages, and with ``norm_eval`` BatchNorm, in evaluation."""
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute features.

        Args:
            x: images ``[B, in_channels, H, W]`` of any size.

        Returns:
            One tensor per entry of ``out_indices``: ``[B, C_i, ceil(H/s), ceil(W/s)]`` with s = 4,
            8, 16, 32; or the class token ``[B, C_4]``. All are contiguous.

        Raises:
            TypeError, ValueError: ``x`` is no batch of images, or not of the model's dtype.
        """
        self._check_images(x)
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i, stage in enumerate(self.stages):
            tokens, hw_shape = stage(x)
            if stage.cls_token is not None:
                tokens = self.norm(tokens)
                if self.out_type == "cls_token":
                    return (tokens[:, 0].contiguous(),)
                tokens = tokens[:, 1:]
            if i in self.out_indices:
                outs.append(as_image(tokens, hw_shape))
            x = tokens.unflatten(1, hw_shape).permute(0, 3, 1, 2)  # a channels-last view
        return tuple(outs)

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
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != dtype and not (autocast and x.is_floating_point()):
            raise TypeError(f"x must be {dtype}, as the weights, got {x.dtype}")

    def extra_repr(self) -> str:
        return (
            f"out_indices={self.out_indices}, out_type={self.out_type}, "
            f"drop_path_rate={self.drop_path_rate}, frozen_stages={self.frozen_stages}, "
            f"norm_eval={self.norm_eval}"
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that train without weight decay, by timm's convention.

        Position embeddings, class token, every norm and every bias: what ``norm_decay_mult=0``,
        ``bias_decay_mult=0`` and the ``custom_keys`` ``pos_embed`` and ``cls_token`` exempt.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() == 1 or name.endswith((".pos_embed", ".cls_token"))
        }

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


def _save_variant(module: SOFT, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Note the variant beside the state dict: the keys of both are the same."""
    local_metadata["variant"] = module.variant


def _halve(size: int) -> int:
    return (size + 1) // 2  # a 3x3 convolution of stride 2 and padding 1


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bound}, got {value}")


def _check_img_size(img_size: Any) -> tuple[int, int]:
    size = tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if len(size) != 2 or not all(_is_int(side) and 0 < side <= _MAX_IMG_SIZE for side in size):
        raise ValueError(
            f"img_size must be one or two positive integers up to {_MAX_IMG_SIZE}, got {img_size!r}"
        )
    return size


def _check_init_cfg(init_cfg: Any) -> None:
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    if init_cfg is not None and not all(isinstance(cfg, dict) and "type" in cfg for cfg in cfgs):
        raise TypeError(f"init_cfg must be a dict with 'type', or a list of them, got {init_cfg!r}")


def _check_out_indices(out_indices: Any, out_type: str) -> tuple[int, ...]:
    _check_choice("out_type", out_type, OUT_TYPES)
    if _is_int(out_indices):
        out_indices = (out_indices,)
    if not isinstance(out_indices, Sequence) or not all(map(_is_int, out_indices)):
        raise TypeError(f"out_indices must list integers, got {out_indices!r}")
    indices = tuple(i + _STAGES if i < 0 else i for i in out_indices)
    if not indices or any(i not in range(_STAGES) for i in indices):
        raise ValueError(f"out_indices must name stages 0 to 3, got {out_indices!r}")
    if list(indices) != sorted(set(indices)):
        raise ValueError(f"out_indices must increase, got {out_indices!r}")
    if out_type == "cls_token" and indices != (_STAGES - 1,):
        raise ValueError(f"out_type='cls_token' needs out_indices=(3,), got {out_indices!r}")
    return indices
