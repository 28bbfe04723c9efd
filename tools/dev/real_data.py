r"""Train and test a config on real images, and make docs/real_data.md from all such runs.

    python tools/dev/real_data.py run configs/nuclei/upernet_softpp-mini_nuclei.py \
        --seed 0 --work-dir work_dirs/upernet_softpp-mini_seed0
    python tools/dev/real_data.py time configs/nuclei/upernet_{softpp-mini,pvtv2-b0}_nuclei.py \
        --work-dir work_dirs/times
    python tools/dev/real_data.py table

`run` calls `mim train` and `mim test` in the current folder, whose `data/` has the converted data,
and writes the row to `docs/real_data/CONFIG_seedN.json` when both have ended. With `--iters` the
schedule is that much longer or shorter, warm-up excepted, and the name says so. `time` trains
several configs for a few iterations in turns, on an otherwise idle machine, writes their seconds
per iteration to `docs/real_data/times/`, which the table then has for all rows of these configs,
and prints how many iterations of each take as long as the first one's schedule. `table --check`
only compares.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from tabulate import tabulate

from mmsoft.commands import CommandError, mim, read_scalars
from mmsoft.fileio import write_whole
from mmsoft.rows import (
    FIELDS,
    Row,
    commit,
    conditions,
    measure_row,
    read_rows,
    seconds,
    spread,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "real_data"
TIMES = ROWS / "times"  # a file for each config
FIGURE = ROWS / "learning.png"
PAGE = ROOT / "docs" / "real_data.md"
# Nothing of the validation images is seen before the test.
NO_VALIDATION = ["val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
TASKS = {  # by folder and first word of a config's name, in the order of the page
    ("nuclei", "mask-rcnn"): "Nuclei, Mask R-CNN",
    ("nuclei", "upernet"): "Nuclei, UperNet",
    ("bccd", "retinanet"): "Blood cells, RetinaNet",
}
METRICS = {  # of the tests: heading, and the scale to 0..1
    "coco/bbox_mAP": ("box AP", 1),
    "coco/segm_mAP": ("mask AP", 1),
    "mIoU": ("mIoU", 0.01),
}
BACKBONES = {
    "softpp-mini": "SOFT++ mini",
    "softpp-t": "SOFT++ Tiny",
    "pvtv2-b0": "PVTv2-B0",
    "pvtv2-b1": "PVTv2-B1",
    "swin-t": "Swin-T",
    "r18": "ResNet-18",
}
PACKAGES = ("python", "torch", "mmsoft", "mmengine", "mmcv", "mmdet", "mmsegmentation")
NAME = re.compile(r"(?P<model>mask-rcnn|upernet|retinanet)_(?P<backbone>[^_]+)_\w+")


# ----------------------------------------------------------------------------------------- running


def run(path: Path, seed: int, work_dir: Path, iterations: int | None, out: Path) -> Path:
    """Train and test one row; gives the file of its figures."""
    return measure_row(
        Config.fromfile(path, import_custom_modules=False),
        path.stem,
        work_dir,
        out,
        root=ROOT,
        seed=seed,
        iterations=iterations,
        timed=False,  # configs that are compared take turns, see `time_in_turns`
        training=NO_VALIDATION,
        packages=PACKAGES,
        extra=lambda scalars: dict(loss=loss_curve(scalars)),
    )


def loss_curve(scalars: Sequence[Row]) -> list[list[float]]:
    """Of the log: iteration and training loss."""
    return [[entry["step"], round(entry["loss"], 4)] for entry in scalars if "loss" in entry]


def time_in_turns(
    paths: Sequence[Path], work_dir: Path, out: Path, rounds: int, iterations: int
) -> None:
    """Train each config for a few iterations in turns; write what those of each took.

    The first two iterations of a run warm it up and are left out.
    """
    samples: dict[Path, list[float]] = {path: [] for path in paths}
    for number in range(rounds):
        for path in paths:
            config = Config.fromfile(path, import_custom_modules=False)
            folder = (work_dir / f"{path.stem}_{number}").absolute()
            folder.mkdir(parents=True)
            changes = [f"train_cfg.max_iters={iterations}", "default_hooks.logger.interval=1"]
            arguments = [config.default_scope, str(path), "--gpus", "0", "--work-dir", str(folder)]
            changes += ["default_hooks.checkpoint=None", *NO_VALIDATION]
            title = f"{path.stem}, {number + 1} of {rounds}"
            command = ["train", *arguments, "--cfg-options", *changes]
            mim(title, command, folder / "train.log", Path.cwd())
            times = [entry["time"] for entry in read_scalars(folder) if "loss" in entry]
            samples[path] += times[2:]
    import torch  # seconds, which a table does without

    from mmsoft.benchmark.measure import device_name

    schedule = Config.fromfile(paths[0], import_custom_modules=False).train_cfg.max_iters
    for path, times in samples.items():
        content = dict(
            config=f"{path.absolute().parent.name}/{path.name}",
            commit=commit(ROOT),
            device=device_name("cpu"),
            threads=torch.get_num_threads(),
            in_turns_with=[other.name for other in paths if other != path],
            seconds=[round(time, 4) for time in times],
        )
        with write_whole(out / f"{path.stem}.json") as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
        median = statistics.median(times)
        equal = schedule * statistics.median(samples[paths[0]]) / median
        print(f"{path.stem}: {median:.3f} s, {equal:.0f} iterations in the time of {paths[0].stem}")


# ---------------------------------------------------------------------------------------- the page

HEAD = """# Real images

Generated by `python tools/dev/real_data.py table`; do not edit.

Backbones inside the same heads, on the nuclei of the 2018 Data Science Bowl (531 images for
training, 133 for testing) and on the blood cells of BCCD (205 and 72, at 320x240). Everything
begins at random: no weights are loaded, and a run is a few hundred iterations on a CPU. What counts
is the difference between rows; with ImageNet weights and a GPU each would be far better. The
recipe is one for all backbones of a task: images, optimizer, learning rate, heads. Configs and
commands are in `configs/nuclei/` and `configs/bccd/`. No row that was measured is left out.
Rows of commits before 1f4e07b have SOFT++ with released landmarks and the direct solver, the
default then.

Parameters are those of the whole model, heads included. Seconds per iteration are the median over
runs of a few iterations in which the configs of a task took turns, loading of images included, and
training seconds those of so many iterations; "-" where that was not measured. Peak memory is the
resident memory of the training process. Figures of several seeds are their mean, with the lowest
and the highest in parentheses; a seed sets the initial weights and the order of the images.
"""
EMPTY = "\nNothing has been measured yet.\n"
SAME_TIME = """
Other lengths of the same schedule, for about the same time instead of the same number of
iterations, beside SOFT++ at its own length:
"""


def read(folder: Path) -> list[Row]:
    """All rows of a folder.

    Raises:
        ValueError: naming the file that is not one.
    """
    return read_rows(folder, "real_data.py", task_of, FIELDS)


def task_of(row: Row) -> tuple[str, str]:
    """The key in TASKS.

    Raises:
        ValueError: there is none.
    """
    folder, _, file = row["config"].partition("/")
    match = NAME.match(file)
    if match is None or (folder, match["model"]) not in TASKS or match["backbone"] not in BACKBONES:
        raise ValueError(f"config {row['config']} is of no known task and backbone")
    return folder, match["model"]


def backbone_of(row: Row) -> str:
    """The key in BACKBONES."""
    match = NAME.match(row["config"].partition("/")[2])
    assert match  # as read() has checked
    return match["backbone"]


def read_times(folder: Path) -> dict[str, Row]:
    """What `time` has written, by config."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {times["config"]: times for times in found}


def cells(rows: Sequence[Row], times: Mapping[str, Row]) -> list[str]:
    """The table's line of the same config and length with several seeds."""
    first = rows[0]
    metrics = [
        spread([row["metrics"][key] * scale for row in rows], 3)
        for key, (_, scale) in METRICS.items()
        if key in first["metrics"]
    ]

    own = times.get(first["config"])
    iteration = statistics.median(own["seconds"]) if own else None
    return [
        BACKBONES[backbone_of(first)],
        f"{first['parameters'] / 1e6:.2f}",
        ", ".join(str(row["seed"]) for row in rows),
        str(first["iterations"]),
        *metrics,
        seconds([iteration]),
        seconds([iteration and iteration * first["iterations"]]),
        f"{max(row['peak_bytes'] for row in rows) / 1e6:.0f}",
    ]


def table(rows: Sequence[Row], key: Callable[[Row], Any], times: Mapping[str, Row]) -> str:
    """A Markdown table, a line for each config and length, in the order of ``key``."""
    lines: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (key(row), row["config"], row["seed"])):
        lines[row["config"], row["iterations"]].append(row)
    names = [name for k, (name, _) in METRICS.items() if k in rows[0]["metrics"]]
    header = ["backbone", "params (M)", "seeds", "iterations", *names]
    header += ["s/iteration", "training (s)", "peak memory (MB)"]
    body = [cells(group, times) for group in lines.values()]
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def render(rows: Sequence[Row], times: Mapping[str, Row]) -> str:
    """The page."""
    text = HEAD + (conditions(rows) if rows else EMPTY)
    for task, title in TASKS.items():
        own = [row for row in rows if task_of(row) == task]
        if not own:
            continue
        text += f"\n## {title}\n"
        scheduled = [row for row in own if row["iterations"] == row["scheduled_iterations"]]
        if scheduled:
            text += "\n" + table(scheduled, lambda row: row["parameters"], times)
        if len(scheduled) < len(own):
            ours = [row for row in scheduled if "softpp" in row["config"]]
            others = [row for row in own if row["iterations"] != row["scheduled_iterations"]]
            text += SAME_TIME + "\n" + table(ours + others, lambda row: row["parameters"], times)
    if any("loss" in row for row in rows):
        text += f"\n## Learning\n\n![Training loss of every run](real_data/{FIGURE.name})\n"
    return text


def draw(rows: Sequence[Row], path: Path) -> None:
    """The training loss of all scheduled runs; of rows older than the figure it is not known."""
    from mmsoft.visualization import draw_learning, save_figure

    runs: dict[str, dict[str, dict[str, list]]] = {}
    for row in sorted(rows, key=lambda row: (list(TASKS).index(task_of(row)), row["parameters"])):
        if "loss" in row and row["iterations"] == row["scheduled_iterations"]:
            lines = runs.setdefault(TASKS[task_of(row)], {})
            lines.setdefault(BACKBONES[backbone_of(row)], dict(loss=[]))["loss"].append(row["loss"])
    if runs:
        save_figure(draw_learning(runs), path)


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("run", help="train and test one row")
    row.add_argument("config", type=Path, help="of configs/nuclei/ or configs/bccd/")
    row.add_argument("--seed", type=int, default=0)
    row.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    row.add_argument("--iters", type=int, help="instead of the config's (the row's name says so)")
    row.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    turns = commands.add_parser("time", help="train configs in turns and time their iterations")
    turns.add_argument("configs", type=Path, nargs="+", help="of one task, ours first")
    turns.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    turns.add_argument("--rounds", type=int, default=3)
    turns.add_argument("--iters", type=int, default=12, help="of each run, at least 3")
    turns.add_argument("--out", type=Path, default=TIMES, help="folder of the times")
    page = commands.add_parser("table", help="write docs/real_data.md")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    args = parser.parse_args()
    try:
        if args.command != "table" and args.work_dir.exists():
            sys.exit(f"error: {args.work_dir} exists; name a new folder")
        if args.command == "time":
            if args.iters < 3 or args.rounds < 1:
                sys.exit("error: --iters must be at least 3 and --rounds at least 1")
            time_in_turns(args.configs, args.work_dir, args.out, args.rounds, args.iters)
            return
        if args.command == "run":
            print(run(args.config, args.seed, args.work_dir, args.iters, args.out))
            return
        rows = read(ROWS)
        text = render(rows, read_times(TIMES))
    except (CommandError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("stale: docs/real_data.md; run python tools/dev/real_data.py table")
        print("current")
        return
    draw(rows, FIGURE)
    with write_whole(PAGE) as partial:
        partial.write_text(text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
