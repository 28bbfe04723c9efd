#!/usr/bin/env python
"""Convergence of the Newton-Raphson inverse over the images of a data set (SOFT, figure 5).

    python tools/analysis_tools/newton_convergence.py CONFIG CHECKPOINT --images 100

For each stage, `||A A_k A - A||_p / ||A||_2` against the step k: mean, and band from the 10 % to
the 90 % quantile, over images, blocks and heads. Two step rules: ours, sample by sample, and the
released one, whose maximum runs over the test batch. As PNG and as CSV.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.runner import Runner
from mmengine.utils import ProgressBar

from mmsoft.analysis import attention_blocks, capture, load_model
from mmsoft.analysis.spectra import NORMS, STEP_RULES
from mmsoft.builder import config_parser, read_config, tool_main
from mmsoft.fileio import write_whole
from mmsoft.visualization import draw_convergence, save_figure
from mmsoft.visualization.convergence import BAND


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: the config's own initialization")
    parser.add_argument("--images", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--norm", choices=NORMS, default="2", help="p of the residual's norm")
    parser.add_argument("--out", default="convergence.png", help="the CSV has the same name")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    return args


@torch.no_grad()
def measure(args: argparse.Namespace) -> tuple[dict[int, dict[str, np.ndarray]], int]:
    """Residuals `[steps + 1, n]` by stage and step rule, and the number of images behind them."""
    config = read_config(args)
    model = load_model(config, args.checkpoint, args.device)
    blocks = attention_blocks(model)
    loader = Runner.build_dataloader(config.test_dataloader)
    found: dict[int, dict[str, list[torch.Tensor]]] = {
        stage: {rule: [] for rule in STEP_RULES} for stage, _ in blocks
    }
    wanted = min(args.images, len(loader.dataset))
    seen, bar = 0, ProgressBar(wanted, file=sys.stderr)
    for batch in loader:
        inputs = model.data_preprocessor(batch, False)["inputs"][: wanted - seen]
        with capture(model) as states:
            model.backbone(inputs)
        for (stage, _), state in states.items():
            for rule in STEP_RULES:
                residuals = state.newton_residuals(rule=rule, norm=args.norm)
                found[stage][rule].append(residuals.flatten(1).cpu())
        seen += len(inputs)
        bar.update(len(inputs))
        if seen >= wanted:
            break
    print(file=sys.stderr)
    joined = {
        stage: {rule: torch.cat(parts, 1).numpy() for rule, parts in rules.items()}
        for stage, rules in sorted(found.items())
    }
    return joined, seen


def write_csv(path: Path, residuals: dict[int, dict[str, np.ndarray]], images: int) -> None:
    """Write one line for each stage, rule and step."""
    with write_whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "rule", "k", "mean", "q10", "q90", "max", "values", "images"])
        for stage, rules in residuals.items():
            for rule, values in rules.items():
                low, high = np.quantile(values, BAND, axis=1)
                columns = values.mean(1), low, high, values.max(1)
                for k, row in enumerate(zip(*columns)):
                    numbers = [f"{number:.6g}" for number in row]
                    writer.writerow([stage, rule, k, *numbers, values.shape[1], images])


@tool_main
def main() -> None:
    """Run the command line."""
    args = parse_args()
    residuals, images = measure(args)
    named = {
        f"stage {stage}": {"ours" if rule == "mmsoft" else rule: v for rule, v in rules.items()}
        for stage, rules in residuals.items()
    }
    figure = draw_convergence(named, args.norm, title=f"{images} images: mean, 10 % to 90 %")
    picture = save_figure(figure, args.out, colours=64)
    write_csv(picture.with_suffix(".csv"), residuals, images)
    print(picture, picture.with_suffix(".csv"), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
