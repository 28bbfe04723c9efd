"""The SOFT and SOFT++ backbones of sequences."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from mmsoft.checkpoint import check_is_ours, check_tensors
from mmsoft.ops.checks import SOLVERS
from mmsoft.ops.library import check_float16
from mmsoft.ops.mode import may_decide
from mmsoft.registry import MODELS

from ..layers import Mlp, SoftmaxBlock
from ..peers import PEERS
from ..plain import is_hooked
from ..sequence import (
    GaussianSequenceAttention,
    LandmarkConv1d,
    NoSequenceAttention,
    PeerSequenceAttention,
    SequenceAttention,
    SoftmaxSequenceAttention,
    ValueConv1d,
)
from .arch import check_choice, check_int, check_rate, resolve_sequence_arch
from .base import Backbone

_TOKENS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ATTENTIONS = ("soft", "softmax", "gaussian", *PEERS, "none")


# All that the backbone is made of. In none a sample's result depends on what else a batch has.
_OF_SAMPLES = frozenset(
    (
        *(nn.Dropout, nn.Embedding, nn.GELU, nn.LayerNorm, nn.Linear, nn.ModuleList, DropPath),
        *(SoftmaxBlock, Mlp, LandmarkConv1d, ValueConv1d, SequenceAttention),
        *(NoSequenceAttention, SoftmaxSequenceAttention, GaussianSequenceAttention),
    )
)


def _is_of_samples(module: nn.Module) -> bool:
    """Whether a part of a batch gets what it would in the whole, and nobody watches.

    A subclass, as a parametrized module is, a method replaced in an instance, a peer's package, or
    what has taken a layer's place may know the batch.
    """
    replaced = any(callable(getattr(type(module), name, None)) for name in vars(module))
    if replaced or is_hooked(module) or type(module) not in _OF_SAMPLES:
        return False
    return all(map(_is_of_samples, module.children()))


def _groups(lengths: Sequence[int], tokens: int) -> tuple[list[int], list[int]]:
    """Cut ascending lengths into groups of at most so many tokens, filled up to their longest.

    Returns:
        How many each has, at least one, and its longest.
    """
    sizes: list[int] = []
    longest: list[int] = []
    for length in lengths:
        if not sizes or (sizes[-1] + 1) * length > tokens:
            sizes.append(0)
            longest.append(0)
        sizes[-1] += 1
        longest[-1] = length
    return sizes, longest


@MODELS.register_module()
class SequenceSOFT(Backbone):
    """SOFT (arXiv 2110.11945) for sequences of tokens, as in the Long Range Arena.

    Embeddings of tokens and positions, pre-norm blocks, a final LayerNorm, and one vector for the
    sequence. :class:`SequenceSOFTPlusPlus` is the variant with the symmetric normalization. Token 0
    is padding and changes nothing.

    Args:
        arch: ``'lra'``, the small model that published comparisons share (2 blocks, 64 channels, 2
            heads, 128 hidden), or a dict with ``embed_dims``, ``depth``, ``num_heads``,
            ``hidden_dims``.
        vocab_size: tokens, 0 included.
        max_length: tokens of the longest sequence; as many positions are learned.
        attention: ``'soft'``; or what it is compared with: ``'softmax'``, ``'gaussian'`` (the exact
            kernel), ``'nystromformer'``, ``'linformer'`` or ``'performer'`` from their packages
            (``pip install "mmsoft[peers]"``), or ``'none'``, where
            every token keeps its own value.
        value_kernel: size of a depthwise convolution of the values, odd; 0 for none.
        out_type: ``'mean'`` of the tokens that are not padding, or ``'cls_token'``.
        max_landmarks: at most this many.
        landmark_stride: tokens per landmark; ``None`` for ``max_length / max_landmarks``. By
            content a smaller one leaves a choice.
        solver: as for :class:`SOFT`, and so the rest.
        newton_steps: likewise.
        landmarks: likewise.
        landmark_sampling: likewise.
        attn_init: likewise.
        drop_rate: dropout after the embeddings, projections and MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        with_cp: gradient checkpointing of every block.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or ``None``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        ImportError: the package of a peer is missing.
    """

    mark = "token_embed.weight"
    group_tokens = 1 << 12  # of sequences that are computed together, padding included

    def __init__(
        self,
        arch: str | dict = "lra",
        *,
        vocab_size: int,
        max_length: int,
        attention: str = "soft",
        value_kernel: int = 0,
        out_type: str = "mean",
        max_landmarks: int = 64,
        landmark_stride: int | None = None,
        solver: str = "newton",
        newton_steps: int = 20,
        landmarks: str = "released",
        landmark_sampling: str = "conv",
        attn_init: str = "balanced",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        self.arch_settings = resolve_sequence_arch(arch)
        for name, choice, choices in (
            ("attention", attention, ATTENTIONS),
            ("out_type", out_type, ("mean", "cls_token")),
            ("solver", solver, SOLVERS),
            ("landmarks", landmarks, ("released", "content")),
            ("landmark_sampling", landmark_sampling, ("conv", "avg")),
            ("attn_init", attn_init, ("balanced", "released")),
        ):
            check_choice(name, choice, choices)
        for name, number, low in (
            ("vocab_size", vocab_size, 2),
            ("max_length", max_length, 1),
            ("value_kernel", value_kernel, 0),
            ("max_landmarks", max_landmarks, 1),
            ("newton_steps", newton_steps, 1),
        ):
            check_int(name, number, low)
        if value_kernel and value_kernel % 2 == 0:
            raise ValueError(f"value_kernel must be odd, or 0 for none, got {value_kernel}")
        check_rate("drop_rate", drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        if not isinstance(with_cp, bool):
            raise TypeError(f"with_cp must be True or False, got {with_cp!r}")
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.out_type = out_type
        self.with_cp = with_cp
        tokens = max_length + (out_type == "cls_token")
        if landmark_stride is None:
            landmark_stride = math.ceil(tokens / max_landmarks)
        check_int("landmark_stride", landmark_stride, 1)
        if landmarks == "released" and math.ceil(tokens / landmark_stride) > max_landmarks:
            raise ValueError(
                f"landmark_stride {landmark_stride} gives {math.ceil(tokens / landmark_stride)} "
                f"landmarks, more than max_landmarks {max_landmarks}; only landmarks='content' "
                "chooses among them"
            )
        dims, depth = self.arch_settings["embed_dims"], self.arch_settings["depth"]
        common = dict(num_heads=self.arch_settings["num_heads"], value_kernel=value_kernel)
        options: dict[str, Any] = dict(drop_rate=drop_rate)
        kind: Any = SequenceAttention
        if attention == "soft":
            options |= dict(
                landmark_stride=landmark_stride,
                normalize=self.normalize,
                max_landmarks=max_landmarks,
                landmarks=landmarks,
                landmark_sampling=landmark_sampling,
                attn_init=attn_init,
                solver=solver,
                newton_steps=newton_steps,
            )
        elif attention in PEERS:
            kind = PeerSequenceAttention
            options |= dict(name=attention, tokens=tokens, landmarks=max_landmarks)
        elif attention == "gaussian":
            kind = GaussianSequenceAttention
            options |= dict(normalize=self.normalize)
        else:
            kind = SoftmaxSequenceAttention if attention == "softmax" else NoSequenceAttention
        self.token_embed = nn.Embedding(vocab_size, dims)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dims))
        self.cls_token = None
        if out_type == "cls_token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            SoftmaxBlock(
                dims,
                kind(embed_dims=dims, **common, **options),
                rate,
                drop_rate,
                self.arch_settings["hidden_dims"],
            )
            for rate in drop_path
        )
        self.norm = nn.LayerNorm(dims, eps=1e-6)
        self._initialize()
        self._foresee_weights()

    def _initialize(self) -> None:
        """Initialize for training from scratch; ``init_cfg`` may load weights over this later.

        Linear layers keep torch's initialization, as in the published comparisons.
        """
        nn.init.trunc_normal_(self.token_embed.weight, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._init_queries()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute one feature vector.

        Args:
            x: tokens ``[B, N]``, integers, 0 where a sequence has ended; or pairs of sequences
                ``[B, 2, N]``.

        Returns:
            ``([B, C],)``; of pairs ``([B, 4 C],)``: both vectors, their product and difference.

        Raises:
            TypeError, ValueError: ``x`` is not that, is longer than ``max_length``, or has a token
                that is not in the vocabulary (the latter is not checked on a GPU); or the weights
                are float16, on a CPU, and torch is older than 2.3.
        """
        self._check_tokens(x)
        x = x if x.dtype in (torch.int32, torch.int64) else x.long()  # as an embedding wants them
        if x.dim() == 3:
            a, b = self._vectors(x.flatten(0, 1)).unflatten(0, x.shape[:2]).unbind(1)
            return (torch.cat((a, b, a * b, a - b), 1),)
        return (self._vectors(x),)

    def _vectors(self, x: Tensor) -> Tensor:
        """``[B, N] -> [B, C]``; on a CPU sequences of about one length at a time.

        So less padding is computed, above all where attention is quadratic.
        """
        if not self._takes_groups(x):
            return self._encode(x)
        place = torch.arange(1, x.shape[1] + 1, device=x.device)
        lengths, order = ((x != 0) * place).amax(1).clamp(min=1).sort(stable=True)
        sizes, longest = _groups(lengths.tolist(), self.group_tokens)
        computed = sum(size * tokens for size, tokens in zip(sizes, longest))
        if computed > 0.9 * x.numel():  # it does not pay
            return self._encode(x)
        groups = zip(x[order].split(sizes), longest)
        vectors = torch.cat([self._encode(group[:, :tokens]) for group, tokens in groups])
        return vectors[order.argsort()]

    def _takes_groups(self, x: Tensor) -> bool:
        if not may_decide(x) or not len(x):  # on a GPU a look at the lengths would stop it
            return False
        if not all(map(_is_of_samples, self.children())):
            return False
        layers: list[Any] = [block.attn for block in self.blocks]
        # The steps of a choice are the same for any batch, and nearly all that evaluation costs.
        return torch.is_grad_enabled() or not any(getattr(attn, "by_content", 0) for attn in layers)

    def _encode(self, x: Tensor) -> Tensor:
        mask = x != 0
        # A sequence of padding alone has one token of it, so that nothing is divided by 0.
        first = torch.arange(x.shape[1], device=x.device) == 0
        mask = mask | (first & ~mask.any(1, keepdim=True))
        x = self.token_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
            mask = torch.cat((torch.ones_like(mask[:, :1]), mask), 1)
        x = self.pos_drop(x + self.pos_embed[:, : x.shape[1]])
        # Where asking costs nothing: passes over memory less.
        where = None if may_decide(x) and bool(mask.all()) else mask
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, where, use_reentrant=False)
            else:
                x = block(x, where)
        x = self.norm(x)
        if self.cls_token is not None:
            return x[:, 0].contiguous()
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _check_tokens(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dtype not in _TOKENS:
            raise TypeError(f"x must hold integers, the numbers of tokens, got {x.dtype}")
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 2) or x.shape[-1] < 1:
            raise ValueError(f"x must be [B, N], or pairs [B, 2, N], got shape {tuple(x.shape)}")
        if x.shape[-1] > self.max_length:
            raise ValueError(
                f"x has {x.shape[-1]} tokens, more than max_length {self.max_length}; cut the "
                "sequences (max_length of the data set), or train with more positions"
            )
        check_float16(self.pos_embed.dtype, x.device.type)
        if may_decide(x) and x.numel():
            low, high = (int(n) for n in x.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"x must hold tokens from 0 to {self.vocab_size - 1} (vocab_size "
                    f"{self.vocab_size}), got {low} to {high}"
                )

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        """Refuse weights of another backbone, size, attention or variant: MMEngine only logs it."""
        own = self._own_tensors()
        check_tensors(state_dict, prefix, own)
        self._match_variant(local_metadata)
        self._match_landmarks(state_dict, prefix)
        self._compare_inverse(local_metadata)
        own = self._own_tensors()
        check_is_ours(state_dict, prefix, own, f"{type(self).__name__}, as configured,")
        for name, tensor in own.items():
            loaded = state_dict.get(f"{prefix}{name}")
            if loaded is not None and loaded.shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(loaded.shape)} in the checkpoint but "
                    f"{tuple(tensor.shape)} here; the arch, vocab_size, max_length, value_kernel "
                    "and landmark_stride of the config must be those of the training"
                )
        self._note_loading(state_dict, prefix, own, *args[1:])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: its name.
            prefix: what precedes the backbone's own names, e.g. ``'backbone.'``.

        Returns:
            ``(depth, num_layers)``: 0 for the embeddings, 1 for the first block, ``num_layers - 1``
            for the final norm and whatever is not in the backbone.
        """
        num_layers = len(self.blocks) + 2
        parts = param_name.removeprefix(prefix).split(".")
        if not param_name.startswith(prefix) or parts[0] in ("norm", ""):
            return num_layers - 1, num_layers
        if parts[0] == "blocks":
            return int(parts[1]) + 1, num_layers
        embeddings = parts[0] in ("token_embed", "pos_embed", "cls_token")
        return (0 if embeddings else num_layers - 1), num_layers

    def extra_repr(self) -> str:
        return (
            f"vocab_size={self.vocab_size}, max_length={self.max_length}, out_type={self.out_type}"
        )


@MODELS.register_module()
class SequenceSOFTPlusPlus(SequenceSOFT):
    """SOFT++ (arXiv 2207.03341) for sequences: :class:`SequenceSOFT`, normalized."""

    normalize = True
    variant = "SOFT++"
