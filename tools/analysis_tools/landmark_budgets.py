#!/usr/bin/env python
r"""Test a trained detector or segmentor with several budgets of landmarks, as it is.

    python tools/analysis_tools/landmark_budgets.py CONFIG CHECKPOINT --budgets 16 49 256 all \
        --data data/legend/ade data/legend_large/ade --json budgets.json

For each data root, of the layout that the config tests on, and each solver: the config's own
measures (mIoU, AP), beside the number of landmarks that the largest image had in the head with most
of them (the first, where the data set does not tell their sizes). `--blocks` prints the relative
error of each block's attention term instead: that of a budget against all landmarks and Newton's
iteration, on the first test images, with the inputs that all landmarks give. `--choice even` takes
an even grid of the candidates in place of the choice by content, whose worth it shows. `--by-size
300 600` adds AP on images of less than 300 x 300 pixels, of less than 600 x 600 and the others,
where annotations are COCO's; it counts all detections of an image, COCO's mAP the best 100.
`--json` collects the rows of several models, for the figure of docs/method.md (`make figures`).

The solver matters for released landmarks alone, the choice for those by content.
"""

import io
import json
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mmengine import load
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from pycocotools.coco import COCO
from tabulate import tabulate
from torch import nn

from mmsoft.analysis import (
    attention_blocks,
    average_precisions,
    by_side,
    capture,
    even_choice,
)
from mmsoft.builder import config_parser, read_config, tool_main
from mmsoft.fileio import write_whole

MEASURES = ("mIoU", "coco/bbox_mAP", "coco/segm_mAP", "accuracy/top1")


def budget(text: str) -> int | None:
    """A number of landmarks, or `all`."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"must be a positive integer or 'all', got {text}")
    return int(text)


def settings(
    model: nn.Module, budgets: Sequence[int | None], solvers: Sequence[str], choice: str
) -> Iterator[dict[str, Any]]:
    """Set each combination in turn; solvers once for landmarks by content."""
    layers = list(attention_blocks(model).values())
    if all(layer.by_content for layer in layers):
        solvers = ["none"]
    with even_choice(layers) if choice == "even" else nullcontext():
        for solver in solvers:
            for most in budgets:
                for layer in layers:
                    layer.max_landmarks = most
                    layer.solver = layer.solver if solver == "none" else solver
                yield dict(budget="all" if most is None else most, solver=solver)


def largest_image(dataset: Any) -> Any:
    """A batch of one: the image of most pixels, or the first if annotations tell no sizes."""
    infos = [dataset.get_data_info(number) for number in range(len(dataset))]
    pixels = [info.get("height", 0) * info.get("width", 0) for info in infos]
    return pseudo_collate([dataset[pixels.index(max(pixels))]])


@torch.no_grad()
def most_landmarks(model: Any, batch: Any) -> int:
    """How many landmarks the head has that has most of them, in any block."""
    with capture(model.eval()) as states:
        model.test_step(batch)
    return max(
        state.landmarks.shape[2] if state.present is None else int(state.present.sum(-1).max())
        for state in states.values()
    )


@contextmanager
def loaded(config: Config) -> Iterator[Runner]:
    """A runner with the checkpoint, whose files are removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        # Loggers and visualizers are kept under these names, with the folders of the first.
        config.work_dir, config.experiment_name = folder, Path(folder).name
        config.pop("visualizer", None)
        runner = Runner.from_cfg(config)
        runner.load_or_resume()
        yield runner


def test(
    config: Config,
    budgets: Sequence[int | None],
    solvers: Sequence[str],
    choice: str,
    sides: Sequence[float] | None,
) -> list[dict]:
    """The rows of one data root, each a stock test; with ``sides`` one for each size of images."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, loaded(config) as runner:
        kept = Path(folder, "predictions.pkl")
        if sides:
            from mmdet.evaluation import DumpDetResults

            runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(kept)))
        largest = largest_image(runner.test_dataloader.dataset)
        by_content = any(layer.by_content for layer in attention_blocks(runner.model).values())
        kind = "by content" if by_content else "released"
        about = dict(
            model=kind if choice == "content" else f"{kind}, {choice} choice",
            seed=config.get("randomness", {}).get("seed"),
            size=list(largest["inputs"][0].shape[1:]),
        )
        for setting in settings(runner.model, budgets, solvers, choice):
            measured = runner.test()
            found = {name: float(measured[name]) for name in MEASURES if name in measured}
            row = about | setting | dict(landmarks=most_landmarks(runner.model, largest)) | found
            rows.append(row | (of_sizes(runner, kept, sides) if sides else {}))
    return rows


def of_sizes(runner: Runner, predictions: Path, sides: Sequence[float]) -> dict[str, Any]:
    """AP of the images between two sides each, square roots of numbers of pixels."""
    dataset = runner.test_dataloader.dataset
    with redirect_stdout(io.StringIO()):
        truth = COCO(dataset.ann_file)
    classes = dataset.metainfo["classes"]
    parts = average_precisions(truth, load(predictions), classes, by_side(sides))
    return {
        f"{kind} {side}": part[kind]
        for side, part in parts.items()
        if side not in ("all", *classes)
        for kind in ("bbox", "segm")
        if kind in part
    }


@torch.no_grad()
def blocks(
    config: Config, budgets: Sequence[int | None], solvers: Sequence[str], choice: str
) -> list[dict]:
    """The relative error of each block's term, Frobenius norm over tokens and channels."""
    with loaded(config) as runner:
        model = runner.model.eval()
        for layer in attention_blocks(model).values():
            layer.max_landmarks, layer.solver = None, "newton"
        with capture(model) as states:
            model.test_step(next(iter(runner.test_dataloader)))

    truth = {block: state.attend() for block, state in states.items()}
    rows = []
    for setting in settings(model, budgets, solvers, choice):
        errors = {
            f"{stage + 1}.{block + 1}": float(
                (state.attend() - truth[stage, block]).norm() / truth[stage, block].norm()
            )
            for (stage, block), state in states.items()
        }
        rows.append(setting | errors)
    return rows


@tool_main
def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--budgets", nargs="+", type=budget, default=[49, 64, 128, 256, None])
    parser.add_argument("--solvers", nargs="+", choices=("newton", "direct"), default=["newton"])
    parser.add_argument("--choice", choices=("content", "even"), default="content")
    parser.add_argument("--data", nargs="+", help="data roots (default: the config's)")
    parser.add_argument(
        "--by-size", nargs="+", type=int, metavar="SIDE", help="edges between sizes of images"
    )
    parser.add_argument("--blocks", action="store_true", help="errors of the attention terms")
    parser.add_argument("--json", type=Path, help="file to which the rows are added")
    args = parser.parse_args()
    if args.by_size and "ann_file" not in read_config(args).test_evaluator:
        parser.error("--by-size needs a config whose test has annotations of COCO's")
    rows: list[dict] = []
    for root in args.data or [None]:
        config = read_config(args)
        config.load_from = args.checkpoint
        if root is not None:
            former = config.test_dataloader.dataset.data_root
            config.test_dataloader.dataset.data_root = root
            if "ann_file" in config.test_evaluator:
                name = config.test_evaluator.ann_file
                config.test_evaluator.ann_file = name.replace(former.rstrip("/"), root.rstrip("/"))
        data = {} if root is None else {"data": root}
        how = args.budgets, args.solvers, args.choice
        found = blocks(config, *how) if args.blocks else test(config, *how, args.by_size)
        rows += [data | row for row in found]
    print(tabulate(rows, "keys", "github", floatfmt=".3f"))
    if args.json:
        rows = (json.loads(args.json.read_text()) if args.json.exists() else []) + rows
        with write_whole(args.json) as path:
            path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
