#!/usr/bin/env python
"""Tell how much a trained model uses its attention: block by block, means over images and heads.

    python tools/analysis_tools/attention_usage.py CONFIG CHECKPOINT IMAGE [IMAGE ...]

Columns: landmarks used; the largest kernel value of a token, its median over the tokens; effective
rank of the matrix that tokens read with, by content rows of a softmax, else of the kernel (1: all
rows are multiples of one); standard deviation of the attention term over that of the values'
convolution; the share of it that differs between tokens.
"""

import sys

import torch
from tabulate import tabulate

from mmsoft.analysis import attention_usage, capture, load_image, load_model
from mmsoft.builder import config_parser, read_config, tool_main

COLUMNS = ("landmarks", "nearest", "rank", "ratio", "varying")


@tool_main
def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args()
    config = read_config(args)
    model = load_model(config, args.checkpoint)
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for name in args.images:
        with torch.no_grad(), capture(model) as states:
            model.backbone(load_image(config, model, name).inputs)
        for block, state in states.items():
            usage = attention_usage(state)
            found.setdefault(block, []).append(
                torch.stack([getattr(usage, column).mean() for column in COLUMNS])
            )
    rows = [
        [f"{stage + 1}.{block + 1}", *torch.stack(values).mean(0).tolist()]
        for (stage, block), values in found.items()
    ]
    print(tabulate(rows, ["block", *COLUMNS], "github", floatfmt=".2f", disable_numparse=[0]))


if __name__ == "__main__":
    sys.exit(main())
