#!/usr/bin/env python
"""Draw what chosen patches of an image attend to, head by head (SOFT, figure 4).

    python tools/analysis_tools/visualize_attention.py CONFIG IMAGE CHECKPOINT \
        --query 40,60 --query 110,30 --stage 1 --compare softmax performer nystromformer

Each row of the contact sheet is a query, each column a head, then the mean over heads: the query's
row of the matrix by which the layer multiplies its values. By content that is what the token reads
from the landmarks times what they gathered from all tokens, not negative and with a sum of 1; with
released landmarks `K1 D^-1/2 A^+ D^-1/2 K1^T` (SOFT leaves out D). With `--compare`, further
columns show other attention methods on the same queries, averaged over the same heads; Performer
and Nystromformer come from the optional extra `peers`. Prints the effective rank of what each
head's tokens read with, by content rows of a softmax over the landmarks, else of the kernel `K1`,
and says where rows hardly depend on the query.
"""

import argparse
import sys

import torch

from mmsoft.analysis import (
    attention_usage,
    capture_image,
    load_model,
    nystromformer_rows,
    performer_rows,
    rows_inside,
    softmax_rows,
)
from mmsoft.builder import config_parser, read_config, tool_main
from mmsoft.visualization import draw_attention, save_figure

PEERS = ("softmax", "performer", "nystromformer")
# Below which a picture misleads: effective rank, and share of the output that differs.
ONE_ROW, ALIKE = 1.1, 0.2


def pixel(text: str) -> tuple[float, float]:
    """Read `x,y`."""
    try:
        x, y = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not x,y, such as 40,60") from error
    return x, y


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = config_parser(__doc__)
    parser.add_argument("image", help="image file")
    parser.add_argument("checkpoint", nargs="?", help="default: the config's own initialization")
    parser.add_argument(
        "--query",
        type=pixel,
        action="append",
        required=True,
        metavar="X,Y",
        help="pixel of the image file whose patch attends; may be given several times",
    )
    parser.add_argument("--stage", type=int, default=0, help="0 to 2, as in out_indices")
    parser.add_argument("--block", type=int, default=-1, help="from 0; -1 for the last (default)")
    parser.add_argument("--head", type=int, nargs="+", help="from 0; default: all heads")
    parser.add_argument("--compare", nargs="+", choices=PEERS, default=[], metavar="METHOD")
    parser.add_argument("--out", default="attention.png", help="default: attention.png")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def caution(rank: float, varying: float) -> str:
    """Why rows hardly depend on the query, if so."""
    why = []
    if rank < ONE_ROW:
        why.append("all rows are nearly multiples of one")
    if varying < ALIKE:
        why.append(f"{varying:.0%} of its output differs between tokens")
    return f", {' and '.join(why)}: rows hardly depend on the query" if why else ""


def draw(args: argparse.Namespace) -> None:
    """Compute the rows and write the sheet."""
    config = read_config(args)
    model = load_model(config, args.checkpoint, args.device)
    image, block, state = capture_image(config, model, args.image, args.stage, args.block)
    count = state.layer.num_heads
    heads = range(count) if args.head is None else args.head
    for head in heads:
        if not 0 <= head < count:
            raise ValueError(f"stage {block[0]} has {count} head(s), from 0; got head {head}")
    queries = [image.token_at(x, y, state.hw_shape) for x, y in args.query]

    def grid(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, state.hw_shape).cpu()

    rows = state.attention_rows(queries)[0]
    name = "SOFT++" if state.layer.normalize else "SOFT"
    maps = {f"{name}, head {head}": grid(rows[head]).numpy() for head in heads}
    if len(heads) > 1:
        maps[f"{name}, mean"] = grid(rows[list(heads)].mean(0)).numpy()
    q, most, what = state.q[:, list(heads)], state.landmarks.shape[2], "landmarks"
    if state.present is not None:
        most = int(state.present[:, list(heads)].sum(-1).max())
        what = "landmarks at most"
    peers = dict(
        softmax=softmax_rows,
        performer=performer_rows,
        nystromformer=lambda q, queries: nystromformer_rows(q, queries, most),
    )
    for method in args.compare:
        rows = rows_inside(peers[method], q, queries, state.mask)
        maps[method] = grid(rows[0].mean(0)).numpy()
    title = f"stage {block[0]}, block {block[1]}: {most} {what}"
    figure = draw_attention(
        image.picture, args.query, maps, image.extent(state.hw_shape), title=title
    )
    usage = attention_usage(state)
    for head in heads:
        rank, varying = float(usage.rank[head]), float(usage.varying[head])
        print(f"head {head}: effective rank {rank:.2f}{caution(rank, varying)}")
    print(save_figure(figure, args.out))


@tool_main
def main() -> None:
    """Run the command line."""
    draw(parse_args())


if __name__ == "__main__":
    sys.exit(main())
