r"""Train and test a config on real images, and make docs/real_data.md from all such runs.

    python tools/dev/real_data.py run configs/nuclei/upernet_softpp-mini_nuclei.py \
        --seed 0 --work-dir work_dirs/upernet_softpp-mini_seed0
    python tools/dev/real_data.py table

`run` calls `mim train` and `mim test` in the current folder, whose `data/` has the converted data,
and writes the row to `docs/real_data/CONFIG_seedN.json` when both have ended. With `--iters` the
schedule is that much longer or shorter, warm-up excepted, and the name says so. With `--untimed`,
for a machine that other work shares, the row has no times. `table --check` only compares.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from tabulate import tabulate

from mmsoft.commands import CommandError, read_scalars, train_and_test
from mmsoft.fileio import write_whole

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "real_data"
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
FIELDS = (
    *("config", "seed", "commit", "iterations", "scheduled_iterations", "metrics", "parameters"),
    *("seconds_per_iteration", "training_seconds", "testing_seconds", "peak_bytes", "threads"),
    *("device", "versions"),
)
PACKAGES = ("python", "torch", "mmsoft", "mmengine", "mmcv", "mmdet", "mmsegmentation")
NAME = re.compile(r"(?P<model>mask-rcnn|upernet|retinanet)_(?P<backbone>[^_]+)_\w+")

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------- running


def schedule(config: Config, iterations: int) -> list[str]:
    """Changes that make ``iterations`` of a config's schedule; the warm-up keeps its length."""
    end = config.train_cfg.max_iters
    changes = [f"train_cfg.max_iters={iterations}"]
    for number, scheduler in enumerate(config.param_scheduler):
        if scheduler.end == end:
            changes.append(f"param_scheduler.{number}.end={iterations}")
    return changes


def timings(entries: Sequence[Row], iterations: int) -> tuple[float, float]:
    """Seconds of an iteration, the median without the first entry, and those of the whole loop.

    Each entry has the mean time of the iterations since the one before.
    """
    steps = [(entry["step"], entry["time"]) for entry in entries if "loss" in entry]
    times = [time for _, time in steps]
    last, total = 0, 0.0
    for step, time in steps:
        total += (step - last) * time
        last = step
    total += (iterations - last) * times[-1]
    return statistics.median(times[1:] or times), total


def commit() -> str:
    """The commit of this checkout, "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def count_parameters(config: Config) -> int:
    """Parameters of a config's model, heads for training alone included."""
    from mmsoft.builder import build_model

    return sum(parameter.numel() for parameter in build_model(config).parameters())


def run(
    path: Path, seed: int, work_dir: Path, iterations: int | None, out: Path, timed: bool = True
) -> Path:
    """Train and test one row; gives the file of its figures."""
    config = Config.fromfile(path, import_custom_modules=False)
    scheduled = config.train_cfg.max_iters
    iterations = iterations or scheduled
    changes = [f"randomness.seed={seed}", *NO_VALIDATION]
    name = f"{path.stem}_seed{seed}"
    if iterations != scheduled:
        changes += schedule(config, iterations)
        name = f"{path.stem}_{iterations}-iterations_seed{seed}"
    version = commit()  # of the files that are about to run
    done = train_and_test(
        name,
        [config.default_scope, str(path), "--gpus", "0"],
        work_dir.absolute(),
        Path.cwd(),
        training=["--cfg-options", *changes],
    )
    seconds, total = timings(read_scalars(work_dir), iterations)
    import torch  # seconds, which the table does without

    from mmsoft.benchmark.measure import device_name, versions

    row = dict(
        config=f"{path.absolute().parent.name}/{path.name}",
        seed=seed,
        commit=version,
        iterations=iterations,
        scheduled_iterations=scheduled,
        metrics=done.metrics,
        parameters=count_parameters(config),
        seconds_per_iteration=round(seconds, 4) if timed else None,
        training_seconds=round(total, 1) if timed else None,
        testing_seconds=round(done.testing.seconds, 1) if timed else None,
        peak_bytes=done.training.peak_bytes,
        threads=torch.get_num_threads(),
        device=device_name("cpu"),
        versions={name: version for name, version in versions().items() if name in PACKAGES},
    )
    target = out / f"{name}.json"
    with write_whole(target) as partial:
        partial.write_text(json.dumps(row, indent=1) + "\n")
    return target


# ---------------------------------------------------------------------------------------- the page

HEAD = """# Real images

Generated by `python tools/dev/real_data.py table`; do not edit.

Backbones inside the same heads, on the nuclei of the 2018 Data Science Bowl (531 images for
training, 133 for testing) and on the blood cells of BCCD (205 and 72, at 320x240). Everything
begins at random: no weights are loaded, and a run is a few hundred iterations on a CPU. What counts
is the difference between rows; with ImageNet weights and a GPU each would be far better. The
recipe is one for all backbones of a task: images, optimizer, learning rate, heads. Configs and
commands are in `configs/nuclei/` and `configs/bccd/`. No row that was measured is left out.

Parameters are those of the whole model, heads included. Seconds per iteration are the median over
the log, loading of images included; training seconds are those of the loop, without start and
test; "-" where other work shared the machine. Peak memory is the resident memory of the training
process. Figures of several seeds are their mean, with the lowest and the highest in parentheses; a
seed sets the initial weights and the order of the images.
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
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            row = json.loads(path.read_text())
            if missing := [field for field in FIELDS if field not in row]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            task_of(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a row of real_data.py: {error}") from None
        rows.append(row)
    return rows


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


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and of several the lowest and the highest."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def seconds(values: Sequence[float | None]) -> str:
    """Three digits of the mean of those that were timed."""
    timed = [value for value in values if value is not None]
    if not timed:
        return "-"
    mean = statistics.mean(timed)
    return f"{mean:.{2 if mean < 10 else 0}f}"


def cells(rows: Sequence[Row]) -> list[str]:
    """The table's line of the same config and length with several seeds."""
    first = rows[0]
    metrics = [
        spread([row["metrics"][key] * scale for row in rows], 3)
        for key, (_, scale) in METRICS.items()
        if key in first["metrics"]
    ]

    def of(field: str) -> list[float]:
        return [row[field] for row in rows]

    return [
        BACKBONES[backbone_of(first)],
        f"{first['parameters'] / 1e6:.2f}",
        ", ".join(str(row["seed"]) for row in rows),
        str(first["iterations"]),
        *metrics,
        seconds(of("seconds_per_iteration")),
        seconds(of("training_seconds")),
        f"{max(of('peak_bytes')) / 1e6:.0f}",
    ]


def table(rows: Sequence[Row], key: Callable[[Row], Any]) -> str:
    """A Markdown table, a line for each config and length, in the order of ``key``."""
    lines: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (key(row), row["config"], row["seed"])):
        lines[row["config"], row["iterations"]].append(row)
    names = [name for k, (name, _) in METRICS.items() if k in rows[0]["metrics"]]
    header = ["backbone", "params (M)", "seeds", "iterations", *names]
    header += ["s/iteration", "training (s)", "peak memory (MB)"]
    body = [cells(group) for group in lines.values()]
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def conditions(rows: Sequence[Row]) -> str:
    """Where and with what the rows were measured."""
    devices = sorted({f"{row['device']}, {count(row['threads'], 'thread')}" for row in rows})
    versions: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, version in row["versions"].items():
            versions[name].add(version)
    used = ", ".join(f"{name} {' and '.join(sorted(versions[name]))}" for name in versions)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"\n{'; '.join(devices)}; {used}; commit {commits}.\n"


def count(number: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def render(rows: Sequence[Row]) -> str:
    """The page."""
    text = HEAD + (conditions(rows) if rows else EMPTY)
    for task, title in TASKS.items():
        own = [row for row in rows if task_of(row) == task]
        if not own:
            continue
        text += f"\n## {title}\n"
        scheduled = [row for row in own if row["iterations"] == row["scheduled_iterations"]]
        if scheduled:
            text += "\n" + table(scheduled, lambda row: row["parameters"])
        if len(scheduled) < len(own):
            ours = [row for row in scheduled if "softpp" in row["config"]]
            others = [row for row in own if row["iterations"] != row["scheduled_iterations"]]
            text += SAME_TIME + "\n" + table(ours + others, lambda row: row["parameters"])
    return text


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
    row.add_argument("--untimed", action="store_true", help="other work shares the machine")
    row.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    page = commands.add_parser("table", help="write docs/real_data.md")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    args = parser.parse_args()
    try:
        if args.command == "run":
            if args.work_dir.exists():
                sys.exit(f"error: {args.work_dir} exists; name a new folder")
            timed = not args.untimed
            print(run(args.config, args.seed, args.work_dir, args.iters, args.out, timed))
            return
        text = render(read(ROWS))
    except (CommandError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("stale: docs/real_data.md; run python tools/dev/real_data.py table")
        print("current")
        return
    with write_whole(PAGE) as partial:
        partial.write_text(text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
