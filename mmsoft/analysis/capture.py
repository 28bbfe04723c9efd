"""Read the queries, values and landmarks of softmax-free attention layers while a model runs."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.padding import Inside
from mmsoft.ops import gaussian_gram, gaussian_kernel

from .rows import attention_rows, landmark_matrix, landmark_rows
from .spectra import inverse_filter, newton_residuals

BlockId = tuple[int, int]
_NAME = re.compile(r"(?:^|\.)stages\.(\d+)\.blocks\.(\d+)\.attn$")


@dataclass
class BlockState:
    """Inputs of one softmax-free attention layer in its last forward pass.

    ``q`` and ``v`` are ``[B, heads, N, d]``, ``landmarks`` ``[B, heads, m, d]``, tokens row by row
    of the grid ``hw_shape``; all detached. ``q`` is scaled by ``d^(-1/4)``.
    """

    layer: SoftmaxFreeAttention
    hw_shape: tuple[int, int]
    q: Tensor
    v: Tensor
    landmarks: Tensor
    present: Tensor | None = None  # which landmarks by content there are, [B, heads, m]
    index: Tensor | None = None  # of their patches, [B, heads, m]
    inside: Inside | None = None  # what is not padding, if there is some

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are not padding, ``[B, N]``; ``None`` for all."""
        return None if self.inside is None or not self.layer.by_content else self.inside.tokens()

    def attend(self) -> Tensor:
        """The layer's attention term, ``[B, H*W, C]``."""
        q, v = (t.transpose(1, 2).flatten(2) for t in (self.q, self.v))
        padding = () if self.inside is None else (self.inside,)
        return self.layer.attend(q, v, self.hw_shape, *padding)

    @property
    def options(self) -> dict[str, Any]:
        """The layer's ``normalize``, ``solver`` and ``steps``."""
        layer = self.layer
        return dict(normalize=layer.normalize, solver=layer.solver, steps=layer.newton_steps)

    def attention_rows(self, queries: Sequence[int]) -> Tensor:
        """Rows of the matrix by which the layer multiplies its values: ``[B, heads, n, N]``.

        Those of :func:`mmsoft.analysis.attention_rows`, times the layer's factor; of landmarks by
        content, those of :func:`mmsoft.analysis.landmark_rows`.
        """
        if self.layer.by_content:
            return landmark_rows(self.q, self.landmarks, queries, self.present, self.mask)
        rows = attention_rows(self.q, self.landmarks, queries, **self.options)
        return rows * self.layer.attention_scale(self.landmarks, self.hw_shape)

    def newton_residuals(self, **options: Any) -> Tensor:
        """Those of the layer's inverse, see :func:`mmsoft.analysis.newton_residuals`.

        Raises:
            ValueError: landmarks by content have no inverse.
        """
        layer = self.layer
        if layer.by_content:
            raise ValueError("landmarks='content' have no inverse: nothing converges")
        options |= dict(normalize=layer.normalize, steps=layer.newton_steps)
        return newton_residuals(self.landmarks, **options)


class KeptRows:
    """Rows of a layer's matrix again and again: what does not depend on the query is kept.

    As :meth:`BlockState.attention_rows`, to the rounding of the products: the kernel ``[N, m]`` is
    stored, in float64 up to 512 MiB, in float32 beyond, so that a row is one product. So is the
    inverse, in float64; that of many landmarks comes from the eigenvectors, on which the iteration
    acts one by one: of a thousand its own products would take six times as long.

    Args:
        state: the layer's.
    """

    float64_elements = 1 << 26
    few_landmarks = 64
    tokens_at_once = 4096

    @torch.no_grad()
    def __init__(self, state: BlockState):
        self.state = state
        self.landmarks = state.landmarks.double()
        elements = state.q[..., 0].numel() * state.landmarks.shape[2]
        dtype = torch.float64 if elements <= self.float64_elements else torch.float32
        q, landmarks = state.q.to(dtype), state.landmarks.to(dtype)
        if state.layer.by_content:
            logits, points = landmarks @ q.mT, state.q.double()
            if (mask := state.mask) is None:
                self.mean = points.mean(2, keepdim=True)
            else:
                there = mask[:, None, :, None]
                self.mean = (points * there).sum(2, keepdim=True) / there.sum(2, keepdim=True)
                logits = logits.masked_fill(~there.mT, -torch.inf)
            self.kernel = logits.softmax(-1).mT  # [B, heads, N, m]
        else:
            self.kernel = q.new_empty(*q.shape[:3], landmarks.shape[2])
            blocks = (t.split(self.tokens_at_once, 2) for t in (self.kernel, q))
            for part, points in zip(*blocks):  # what each takes stays in the caches
                part.copy_(gaussian_kernel(points, landmarks))
            few = state.landmarks.shape[2] <= self.few_landmarks
            matrix = landmark_matrix if few else _matrix_by_eigenvectors
            self.middle = matrix(self.landmarks, **state.options)

    @property
    def nbytes(self) -> int:
        """Of all tensors that are kept, those of the layer's state among them."""
        kept = (*vars(self).values(), *vars(self.state).values())
        return sum(each.nbytes for each in kept if isinstance(each, Tensor))

    @torch.no_grad()
    def __call__(self, queries: Sequence[int]) -> Tensor:
        """Rows of so many tokens: ``[B, heads, n, N]``, float64."""
        state = self.state
        q = state.q[:, :, list(queries)].double()
        if state.layer.by_content:
            logits = (q - self.mean) @ self.landmarks.mT
            if state.present is not None:
                logits = logits.masked_fill(~state.present[:, :, None], -torch.inf)
            weights = logits.softmax(-1)
        else:
            weights = gaussian_kernel(q, self.landmarks) @ self.middle
            weights = weights * state.layer.attention_scale(state.landmarks, state.hw_shape)
        return (self.kernel @ weights.to(self.kernel.dtype).mT).mT.double()


def _matrix_by_eigenvectors(landmarks: Tensor, *, normalize: bool, **options: Any) -> Tensor:
    """``landmark_matrix`` of float64, to rounding."""
    a = gaussian_gram(landmarks)
    if not a.isfinite().all():  # nothing to decompose
        return landmark_matrix(landmarks, normalize=normalize, **options)
    values, vectors = torch.linalg.eigh(a)
    filters = inverse_filter(landmarks, values, normalize=normalize, **options)
    pinv = (vectors * filters[..., None, :]) @ vectors.mT
    if not normalize:
        return pinv
    root = a.sum(-1, keepdim=True).rsqrt()
    return root * pinv * root.mT


def attention_blocks(model: nn.Module) -> dict[BlockId, SoftmaxFreeAttention]:
    """The softmax-free attention layers of a model by (stage, block), both counted from 0.

    Raises:
        ValueError: there are none.
    """
    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, SoftmaxFreeAttention) and (match := _NAME.search(name)):
            blocks[int(match[1]), int(match[2])] = module
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no softmax-free attention; its backbone must be "
            "mmsoft.SOFT or mmsoft.SOFTPlusPlus"
        )
    return blocks


def choose_block(model: nn.Module, stage: int, block: int) -> BlockId:
    """Check that a model has softmax-free attention in a block; ``block`` may be -1 for the last.

    Raises:
        ValueError: it does not; the message lists the stages or blocks that do.
    """
    known = attention_blocks(model)
    stages = sorted({s for s, _ in known})
    if stage not in stages:
        raise ValueError(
            f"stage {stage} has no softmax-free attention; choose one of "
            + ", ".join(map(str, stages))
        )
    count = sum(s == stage for s, _ in known)
    if not -count <= block < count:
        raise ValueError(f"stage {stage} has {count} block(s), numbered from 0; got block {block}")
    return stage, block % count


@contextmanager
def capture(model: nn.Module, only: BlockId | None = None) -> Iterator[dict[BlockId, BlockState]]:
    """Record the inputs of every softmax-free attention layer within the ``with`` block.

    The layers' queries, values and landmarks are computed a second time, without gradient. Not for
    models that ``torch.compile`` has already compiled: it leaves hooks out.

    Args:
        model: holds a SOFT or SOFT++ backbone.
        only: a single (stage, block) to record, to save memory.

    Yields:
        A dict that forward passes fill; a later pass replaces an earlier one.

    Raises:
        ValueError: the model has no such layer.
    """
    states: dict[BlockId, BlockState] = {}
    blocks = attention_blocks(model)
    if only is not None:
        block = choose_block(model, *only)
        blocks = {block: blocks[block]}

    def record(block: BlockId, layer: SoftmaxFreeAttention, args: tuple) -> None:
        x, hw_shape, *padding = args
        split = (layer.num_heads, layer.head_dims)
        with torch.no_grad():
            q, v = layer.queries_and_values(x)
            states[block] = BlockState(
                layer,
                hw_shape,
                q.unflatten(2, split).transpose(1, 2),
                v.unflatten(2, split).transpose(1, 2),
                *layer.sample_landmarks(q, hw_shape, *padding),
                *padding,
            )

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, block=block: record(block, layer, args))
        for block, layer in blocks.items()
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
