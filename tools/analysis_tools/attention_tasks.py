"""Train one attention layer on tasks that nothing else in the model can solve, and compare.

    python tools/analysis_tools/attention_tasks.py recall --pairs 4 16
    python tools/analysis_tools/attention_tasks.py lookup --attention released content --seeds 3

`lookup`: one token of a grid, 16x16 unless told otherwise, shows a class, every token answers it;
then, without further training, on larger grids, position embeddings resized, with budgets of 16 and
of 49 landmarks. `recall`: pairs of key and value at random places, keys drawn anew for every
sample, and queries elsewhere, which show a key and answer its value.

One post-norm block, 64 channels in 2 heads, without the values' convolution. Landmarks have patches
of 4x4 tokens, and in recall 8x8 patches share the grid. `gaussian` is the exact kernel, all tokens
with all. What the landmarks by content are worth: `even` takes an even grid of the same candidates
in place of the choice, `mean` chooses among plain means of the patches. Peers have the defaults of
their packages (`pip install "mmsoft[peers]"`). Prints accuracies over the seeds: mean and range.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.utils import track_iter_progress
from tabulate import tabulate
from torch import Tensor, nn

from mmsoft.analysis import evenly
from mmsoft.benchmark.cases import OPERATORS
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.layers import SOFTBlock, resize_pos_embed
from mmsoft.models.sequence import GaussianSequenceAttention
from mmsoft.ops import landmark_patches

DIMS, HEADS, CLASSES, KEYS = 64, 2, 8, 16
SIDE = 16
BUDGETS, SIDES = (16, 49), (16, 28, 32, 64, 128)
Batch = tuple[tuple[Tensor, ...], Tensor, Tensor]  # inputs, tokens [B, n], their classes [B, n]


class NoAttention(SoftmaxFreeAttention):
    """The layer without its attention term."""

    def attend(self, q: Tensor, v: Tensor, *where: Any) -> Tensor:
        """Nothing."""
        return torch.zeros_like(v)


class EvenAttention(SoftmaxFreeAttention):
    """Landmarks by content without the choice."""

    choose = evenly


class MeanAttention(SoftmaxFreeAttention):
    """A choice by content among plain means of the patches."""

    def sample_landmarks(self, q: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """As there."""
        patches = landmark_patches(q, hw_shape, self.num_heads, self.landmark_stride)
        every = patches.mean(3).transpose(1, 2)
        index, present = self.choose(every, None, hw_shape)
        chosen = every.gather(2, index[..., None].expand(-1, -1, -1, self.head_dims))
        return chosen, present, index


OURS = dict(
    released=SoftmaxFreeAttention,
    content=SoftmaxFreeAttention,
    even=EvenAttention,
    mean=MeanAttention,
    none=NoAttention,
)


class OfTokens(nn.Module):
    """A peer's layer, which takes tokens without their grid."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend."""
        return self.layer(x)


def build_attention(name: str, side: int = SIDE, budget: int = 49, stride: int = 4) -> nn.Module:
    """Our layer, one of ``OURS``, or `gaussian`, or a peer's."""
    if name == "gaussian":
        return OfTokens(GaussianSequenceAttention(DIMS, HEADS, 0, 0.0, normalize=True))
    if name not in OURS:
        return OfTokens(OPERATORS[name][1](side * side))
    landmarks = "released" if name in ("released", "none") else "content"
    options: dict[str, Any] = dict(normalize=True, max_landmarks=budget, solver="direct")
    layer = OURS[name](DIMS, HEADS, stride, 3, landmarks=landmarks, **options)
    for part in (layer.query, layer.value, layer.proj):
        nn.init.trunc_normal_(part.weight, std=0.02)
        nn.init.zeros_(part.bias)
    layer.init_queries()
    nn.init.zeros_(layer.value_conv.weight).requires_grad_(False)
    return layer


class Lookup(nn.Module):
    """A class embedding at one place, one block, classifier."""

    def __init__(self, attention: nn.Module, side: int = SIDE):
        super().__init__()
        self.side = side
        self.embed = nn.Embedding(CLASSES, DIMS)
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, DIMS))
        self.block = SOFTBlock(DIMS, attention, 0.0, 0.0)
        self.head = nn.Linear(DIMS, CLASSES)

    def forward(self, classes: Tensor, places: Tensor, side: Tensor) -> Tensor:
        """Logits of all tokens."""
        grid = (int(side), int(side))
        x = resize_pos_embed(self.position, (self.side, self.side), grid).repeat(len(classes), 1, 1)
        x[range(len(classes)), places] += self.embed(classes)
        return self.head(self.block(x, grid))


def lookup(size: int, g: torch.Generator, side: int = SIDE) -> Batch:
    """A class and a place for each sample; every token answers."""
    classes = torch.randint(CLASSES, (size,), generator=g)
    places = torch.randint(side * side, (size,), generator=g)
    every = torch.arange(side * side).expand(size, -1)
    return (classes, places, torch.tensor(side)), every, classes[:, None].expand(every.shape)


class Recall(nn.Module):
    """Tokens of keys with values, of keys alone, and empty ones; one block, classifier."""

    def __init__(self, attention: nn.Module, side: int = SIDE):
        super().__init__()
        self.side = side
        self.key = nn.Linear(KEYS, DIMS)
        self.value = nn.Embedding(CLASSES, DIMS)
        self.kind = nn.Embedding(3, DIMS)
        self.norm = nn.LayerNorm(DIMS)
        self.block = SOFTBlock(DIMS, attention, 0.0, 0.0)
        self.head = nn.Linear(DIMS, CLASSES)

    def forward(self, keys: Tensor, values: Tensor, kinds: Tensor) -> Tensor:
        """Logits of all tokens."""
        x = self.kind(kinds) + (kinds > 0)[..., None] * self.key(keys)
        x = self.norm(x + (kinds == 1)[..., None] * self.value(values))
        return self.head(self.block(x, (self.side, self.side)))


def recall(
    size: int, g: torch.Generator, pairs: int = 4, queries: int = 16, side: int = SIDE
) -> Batch:
    """Pairs and queries at random places; the queries answer."""
    shown = 4 * F.normalize(torch.randn(size, pairs, KEYS, generator=g), dim=-1)
    answers = torch.randint(CLASSES, (size, pairs), generator=g)
    asked = torch.randint(pairs, (size, queries), generator=g)
    places = torch.rand(size, side * side, generator=g).argsort(1)[:, : pairs + queries]
    sample = torch.arange(size)[:, None]
    keys = torch.zeros(size, side * side, KEYS)
    values = torch.zeros(size, side * side, dtype=torch.long)
    kinds = torch.zeros(size, side * side, dtype=torch.long)
    keys[sample, places] = torch.cat((shown, shown[sample, asked]), 1)
    values[sample, places[:, :pairs]] = answers
    kinds[sample, places[:, :pairs]] = 1
    kinds[sample, places[:, pairs:]] = 2
    return (keys, values, kinds), places[:, pairs:], answers[sample, asked]


def answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[n, classes]` and classes `[n]` of all tokens that are asked."""
    inputs, tokens, classes = batch
    logits = model(*inputs)
    logits = logits.gather(1, tokens[..., None].expand(-1, -1, logits.shape[2]))
    return logits.flatten(0, 1), classes.flatten()


def train(model: nn.Module, draw: Callable[..., Batch], steps: int, seed: int, lr: float) -> None:
    """Adam with a warm-up of 50 steps, constant to the half, then linear to 0."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50, 2 - 2 * step / steps)
        loss = F.cross_entropy(*answers(model, draw(32, g)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, draw: Callable[..., Batch], batches: int = 8) -> float:
    """Over 16 samples in each of some batches that training has not seen."""
    g = torch.Generator().manual_seed(-1)
    right = [
        (logits.argmax(-1) == classes).double().mean()
        for logits, classes in (answers(model, draw(16, g)) for _ in range(batches))
    ]
    return float(torch.stack(right).mean())


def main() -> None:
    """Parse the command line, train, print the table."""
    peers = (name for name in OPERATORS if not name.startswith("softpp"))
    known = (*OURS, "gaussian", *peers)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("lookup", "recall"))
    parser.add_argument("--attention", nargs="+", choices=known, default=list(known))
    parser.add_argument("--pairs", type=int, nargs="+", default=[4], help="of recall (default: 4)")
    parser.add_argument("--side", type=int, default=SIDE, help="of the grid (default: 16)")
    parser.add_argument("--landmarks", type=int, default=49, help="at most, in training (49)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    found: dict[tuple[str, ...], list[float]] = {}
    runs = [(n, s, p) for n in args.attention for p in args.pairs for s in range(args.seeds)]
    for name, seed, pairs in track_iter_progress(runs):
        torch.manual_seed(seed)
        stride = args.side // 8 if args.task == "recall" else 4
        attention = build_attention(name, args.side, args.landmarks, stride)
        if args.task == "recall":
            model: nn.Module = Recall(attention, args.side)

            def draw(size: int, g: torch.Generator, pairs: int = pairs) -> Batch:
                return recall(size, g, pairs, side=args.side)

            train(model, draw, args.steps, seed, args.lr)
            found.setdefault((name, f"{pairs} pairs"), []).append(accuracy(model, draw))
            continue
        model = Lookup(attention, args.side)
        train(model, partial(lookup, side=args.side), args.steps, seed, args.lr)
        ours = isinstance(attention, SoftmaxFreeAttention)
        for side in SIDES if ours else (args.side,):
            for budget in BUDGETS if ours else (None,):
                if isinstance(attention, SoftmaxFreeAttention):
                    attention.max_landmarks = budget
                where = f"{side}x{side}" + (f", {budget} landmarks" if budget else "")
                right = accuracy(model, partial(lookup, side=side), max(2**14 // side**2, 4))
                found.setdefault((name, where), []).append(right)
    rows = [
        [*key, f"{sum(values) / len(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"]
        for key, values in found.items()
    ]
    print(tabulate(rows, ["attention", args.task, "accuracy", "range"], "github"))


if __name__ == "__main__":
    main()
