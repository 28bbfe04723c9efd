r"""Train and test a config of the Long Range Arena, and make docs/lra.md from all such runs.

    python tools/dev/lra.py run configs/lra/softpp_listops.py --attention softmax \
        --seed 0 --work-dir work_dirs/softmax_listops_seed0
    python tools/dev/lra.py time configs/lra/softpp_listops.py --attention soft++ softmax none \
        --work-dir work_dirs/times
    python tools/dev/lra.py baselines listops data/listops
    python tools/dev/lra.py table

`run` calls `mim train` and `mim test` in the current folder, whose `data/` has the data, and writes
the row to `docs/lra/TASK_ATTENTION_seedN.json` when both have ended. `soft++` is the config as it
is, `soft` without the normalization, `content` with landmarks by content, `-conv` with the
convolution of values. With `--iters` the schedule is that much longer or shorter, warm-up excepted,
and the name says so. `time` trains attentions for a few iterations in turns, on an otherwise idle
machine, and writes their seconds per iteration to `docs/lra/times/TASK.json`. `baselines` writes to
`docs/lra/baselines/TASK.json` what is right without reading an expression of ListOps, or its first
operator alone. `table --check` only compares.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from tabulate import tabulate

from mmsoft.commands import CommandError
from mmsoft.fileio import write_whole
from mmsoft.rows import (
    FIELDS,
    WARM_UP,
    Row,
    Subject,
    conditions,
    digest,
    measure_row,
    read_rows,
    read_times,
    seconds_of,
    short,
    spread,
    time_in_turns,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "lra"
BASELINES = ROWS / "baselines"  # a file for each task
TIMES = ROWS / "times"  # a file for each task
PAGE = ROOT / "docs" / "lra.md"
FIGURE = ROOT / "docs" / "lra" / "learning.png"
NOTE = "Rows"  # in the figure's file: the digest of what it shows
TASKS = {  # by config, in the order of the page
    "listops": "ListOps",
    "listops-1000": "ListOps, 500 to 1000 tokens",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder32": "Pathfinder",
}
BACKBONE = "model.backbone."
CONVOLVED = f"{BACKBONE}value_kernel=33"  # of MRA attention's comparison
ATTENTIONS = {  # label, changes of the config
    "soft++": ("SOFT++", []),
    "soft++-conv": ("SOFT++, convolution of values (33)", [CONVOLVED]),
    "soft": ("SOFT", [f"{BACKBONE}type=mmsoft.SequenceSOFT"]),
    "soft-conv": (
        "SOFT, convolution of values (33)",
        [f"{BACKBONE}type=mmsoft.SequenceSOFT", CONVOLVED],
    ),
    "content": (
        "SOFT++, landmarks by content",
        [f"{BACKBONE}landmarks=content", f"{BACKBONE}landmark_stride=8"],
    ),
    "softmax": ("softmax", [f"{BACKBONE}attention=softmax"]),
    "softmax-conv": (
        "softmax, convolution of values (33)",
        [f"{BACKBONE}attention=softmax", CONVOLVED],
    ),
    "gaussian": ("exact Gaussian kernel, normalized", [f"{BACKBONE}attention=gaussian"]),
    "nystromformer": (
        "Nyströmformer, no convolution",
        [f"{BACKBONE}attention=nystromformer"],
    ),
    "nystromformer-conv": (
        "Nyströmformer, convolution of values (35)",
        [f"{BACKBONE}attention=nystromformer", f"{BACKBONE}value_kernel=35"],
    ),
    "linformer": ("Linformer", [f"{BACKBONE}attention=linformer"]),
    "performer": ("Performer", [f"{BACKBONE}attention=performer"]),
    "none": ("none", [f"{BACKBONE}attention=none"]),
}
METRIC = "accuracy/top1"
NEAR = 2  # points above the most frequent class, within which nothing has been learned
PACKAGES = (
    *("python", "torch", "mmsoft", "mmengine", "mmpretrain"),
    *("linformer", "performer-pytorch", "nystrom-attention"),
)
# Accuracies in percent: ListOps, text, retrieval, image, Pathfinder.
PUBLISHED = {
    "Nyströmformer's protocol (arXiv 2102.03902)": {
        "standard attention": (37.10, 65.02, 79.35, 38.20, 74.16),
        "Nyströmformer": (37.15, 65.52, 79.56, 41.58, 70.94),
    },
    "Skyformer's protocol (arXiv 2111.00035)": {
        "self-attention": (38.37, 61.95, 80.69, 40.57, 65.26),
        "exact Gaussian kernel": (38.78, 60.22, 81.77, 41.29, 70.73),
        "Nyströmformer": (38.51, 64.83, 80.52, 41.30, 69.48),
        "Skyformer": (38.69, 64.70, 82.06, 40.77, 70.73),
    },
}

# ----------------------------------------------------------------------------------------- running


def curves(scalars: list[Row]) -> Row:
    """Of the log: training loss, and accuracy on the validation split."""
    losses = [[entry["step"], round(entry["loss"], 4)] for entry in scalars if "loss" in entry]
    found = [[entry["step"], entry[METRIC]] for entry in scalars if METRIC in entry]
    return dict(loss=losses, validation=found)


def options(changes: Sequence[str]) -> dict[str, str | int]:
    """The changes as mim would read them."""
    pairs = (change.split("=") for change in changes)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


def with_attention(path: Path, attention: str) -> Config:
    """A config of configs/lra/ with one of ATTENTIONS."""
    config = Config.fromfile(path, import_custom_modules=False)
    config.merge_from_dict(options(ATTENTIONS[attention][1]))
    return config


def run(
    path: Path,
    attention: str,
    seed: int,
    work_dir: Path,
    iterations: int | None,
    out: Path,
) -> Path:
    """Train and test one row; gives the file of its figures."""
    config = with_attention(path, attention)
    data = parameters_of(Path(config.train_dataloader.dataset.data_root))
    return measure_row(
        config,
        f"{task_of_config(path.name)}_{attention}",
        work_dir,
        out,
        root=ROOT,
        seed=seed,
        iterations=iterations,
        changes=ATTENTIONS[attention][1],
        packages=PACKAGES,
        extra=lambda scalars: dict(attention=attention, data=data, **curves(scalars)),
    )


def parameters_of(folder: Path) -> Row | None:
    """What the data of a folder were generated with; ``None`` for data as distributed."""
    stamp = folder / "parameters.json"
    return json.loads(stamp.read_text()) if stamp.is_file() else None


def time_attentions(
    path: Path, attentions: Sequence[str], work_dir: Path, out: Path, rounds: int, iterations: int
) -> list[list[float]]:
    """Time attentions of one task in turns; gives the seconds of each."""
    task = task_of_config(path.name)
    subjects = []
    for name in attentions:
        config = with_attention(path, name)
        root = Path(config.train_dataloader.dataset.data_root)
        says = dict(attention=name, digest=digest(config), data=parameters_of(root))
        subjects.append(Subject(f"{task}_{name}", path, ATTENTIONS[name][1], says))
    target = out / f"{task}.json"
    turns = (rounds, iterations)
    return time_in_turns(subjects, work_dir, target, *turns, root=ROOT, packages=PACKAGES)


def baselines(task: str, folder: Path, out: Path) -> Path:
    """Write the accuracies on ListOps of one answer for all, and of one for each root operator.

    Answers are those most frequent in the training split.

    Raises:
        FileNotFoundError, ValueError: the folder does not have the task's data.
    """
    from mmsoft.datasets import ListOps
    from mmsoft.datasets.long_range_arena import LISTOPS_TOKENS

    config = Config.fromfile(
        ROOT / f"configs/lra/softpp_{task}.py", import_custom_modules=False
    ).train_dataloader.dataset
    counts: dict[str, dict[str, Counter]] = {}
    for split in ("train", "test"):
        counts[split] = defaultdict(Counter)
        data = ListOps(str(folder), split, config.get("max_length"))
        for number in range(len(data)):
            sample = data.get_data_info(number)
            root = LISTOPS_TOKENS[sample["tokens"][0] - 1].lstrip("[")
            for key in ("", root):
                counts[split][key][sample["gt_label"]] += 1
    answers = {key: count.most_common(1)[0][0] for key, count in sorted(counts["train"].items())}
    size = counts["test"][""].total()
    right = {key: counts["test"][key][answer] for key, answer in answers.items()}
    answer = answers.pop("")
    found = dict(
        task=task,
        data=parameters_of(folder),
        test_size=size,
        most_frequent=dict(answer=answer, accuracy=100 * right.pop("") / size),
        root_operator=dict(answers=answers, accuracy=100 * sum(right.values()) / size),
    )
    target = out / f"{task}.json"
    with write_whole(target) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")
    return target


# ---------------------------------------------------------------------------------------- the page


def measured() -> tuple[list[Row], dict[str, Row], list[Row]]:
    """All that the page shows: rows, baselines by task, and times."""
    return read(ROWS), read_baselines(BASELINES), times_of(TIMES)


HEAD = """# Long Range Arena

Generated by `python tools/dev/lra.py table`; do not edit.

One small model, whose attention is exchanged: 2 blocks, 64 channels, 2 heads, mean over the tokens.
Configs, commands, and the differences from the published protocols are in `configs/lra/`. The test
is of the last weights. No row that was measured is left out. Accuracies of several seeds are their
mean, with the lowest and the highest in parentheses; a seed sets the initial weights and the order
of the sequences. Peak memory is the resident memory of the training process, Python and the data
included, the most of all seeds. On a CPU sequences of about one length are computed together from
commit 8865682 on, which leaves out much of the padding; before, and in the peers of packages, all
of it takes time and memory. The results of a sequence are the same, dropout draws other numbers
from a seed, and so rows of both share a line. Nyströmformer's row is of a commit at which its
landmarks were parts of the batch's longest sequence, not of the task's, as they are now and as
published.

Two lines on ListOps need no model: one class for all, and one for each root operator, which is the
first token, in both cases those most frequent in training. A row that is no higher than the second
is not shown to have learned more than to read that token.

Pathfinder has no row yet: 62400 iterations of 256 images would take more than a week on two cores
(17 to 21 s for one of SOFT++ on one thread, other work beside it).
"""
BASELINE = """
For all {answer}; by the root operator {answers}. The standard error of an accuracy over the
test's {size} expressions is {error:.1f} points there.
"""
TIMES_HEAD = """
## Time

Seconds of a training iteration, loading included, each attention in turns on the same batches: the
median, in parentheses both quartiles, and the peak memory of these few iterations.

"""
EMPTY = "\nNothing has been measured yet.\n"
PUBLISHED_HEAD = """
## What others publish

Quoted from their papers; protocols differ from each other and from ours. On ListOps they are near
what the root operator alone gives on the data that are generated here.

"""


def task_of_config(file: str) -> str:
    """The key in TASKS.

    Raises:
        ValueError: there is none.
    """
    task = file.removeprefix("softpp_").removesuffix(".py")
    if task not in TASKS:
        raise ValueError(f"config {file} is of no known task")
    return task


def check(row: Row) -> None:
    """Raise ValueError unless a row has a known task and attention."""
    task_of_config(Path(row["config"]).name)
    if row.get("attention") not in ATTENTIONS:
        raise ValueError(f"attention {row.get('attention')} is unknown")


def read(folder: Path) -> list[Row]:
    """All rows of a folder.

    Raises:
        ValueError: naming the file that is not one.
    """
    fields = (*FIELDS, "digest", "data", "attention", "loss", "validation")
    return read_rows(folder, "lra.py", check, fields)


def times_of(folder: Path) -> list[Row]:
    """What `time` has written.

    Raises:
        ValueError: naming the file that is not of it.
    """

    def of_attention(each: Row) -> None:
        if not isinstance(each.get("peak_bytes"), int):
            raise ValueError("a subject lacks peak_bytes")
        if missing := [key for key in ("digest", "data") if key not in each]:
            raise ValueError(f"a subject lacks {', '.join(missing)}")
        check(each)

    return read_times(folder, "lra.py", of_attention)


def read_baselines(folder: Path) -> dict[str, Row]:
    """What :func:`baselines` wrote, by task.

    Raises:
        ValueError: naming the file that is not of it.
    """
    fields = ("task", "test_size", "most_frequent", "root_operator")
    found = read_rows(folder, "lra.py", lambda row: task_of_config(row["task"]), fields)
    return {row["task"]: row for row in found}


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of a task that differ by their seeds alone: attention and iterations -> rows.

    Raises:
        ValueError: they differ by more, or two have the same seed.
    """
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    order = list(ATTENTIONS)
    for row in sorted(rows, key=lambda row: (order.index(row["attention"]), row["seed"])):
        found[row["attention"], row["iterations"]].append(row)
    for (attention, iterations), group in found.items():
        for key in ("digest", "data", "parameters", "scheduled_iterations"):
            if any(row[key] != group[0][key] for row in group):
                raise ValueError(f"{attention}, {iterations} iterations: rows differ in {key}")
        if len({row["seed"] for row in group}) < len(group):
            raise ValueError(f"{attention}, {iterations} iterations: two rows of one seed")
    return found


def accuracy(group: Sequence[Row], baseline: Row | None) -> str:
    """Of seeds that differ by nothing else; it says where it is that of a constant answer."""
    values = [row["metrics"][METRIC] for row in group]
    text = spread(values, 2)
    if baseline and sum(values) / len(values) <= baseline["most_frequent"]["accuracy"] + NEAR:
        text += ", not past one class for all"
    return text


def table(rows: Sequence[Row], baseline: Row | None = None) -> str:
    """A Markdown table of one task."""
    body = [
        [
            ATTENTIONS[attention][0],
            f"{group[0]['parameters'] / 1e3:.0f}",
            ", ".join(str(row["seed"]) for row in group),
            str(iterations),
            accuracy(group, baseline),
            f"{max(row['peak_bytes'] for row in group) / 1e6:.0f}",
            ", ".join(dict.fromkeys(short(row["commit"]) for row in group)),
        ]
        for (attention, iterations), group in groups(rows).items()
    ]
    if baseline:
        for name, key in (
            ("one class for all", "most_frequent"),
            ("the root operator alone", "root_operator"),
        ):
            accurate = f"{baseline[key]['accuracy']:.2f}"
            body.append([name, "-", "-", "-", accurate, "-", "-"])
    header = ["attention", "params (k)", "seeds", "iterations", "accuracy (%)"]
    header += ["peak memory (MB)", "commit"]
    align = ["left"] + ["right"] * (len(header) - 2) + ["left"]
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def table_of_times(times: Sequence[Row]) -> str:
    """Attentions by tasks, and where each task's were measured.

    Raises:
        ValueError: those of one task did not take turns.
    """
    by_task: dict[str, dict[str, Row]] = defaultdict(dict)
    for each in times:
        by_task[task_of_config(Path(each["config"]).name)][each["attention"]] = each
    tasks = [task for task in TASKS if task in by_task]
    text = ""
    for task in tasks:
        first, *rest = by_task[task].values()
        if any(each["session"] != first["session"] for each in rest):
            raise ValueError(f"times of {task} are of more than one session")
        plural = "" if first["threads"] == 1 else "s"
        where = f"{first['device']}, {first['threads']} thread{plural}"
        used = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        text += f"\n{TASKS[task]}: {where}; {used}; commit {short(first['commit'])}.\n"

    def cell(each: Row | None) -> str:
        return f"{seconds_of(each)}, {each['peak_bytes'] / 1e6:.0f} MB" if each else "-"

    body = [
        [label, *(cell(by_task[task].get(attention)) for task in tasks)]
        for attention, (label, _) in ATTENTIONS.items()
        if any(attention in by_task[task] for task in tasks)
    ]
    header = ["attention", *(TASKS[task] for task in tasks)]
    align = ["left"] + ["right"] * len(tasks)
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n" + text


def about(baseline: Row) -> str:
    """What the baselines of a task are."""
    root, size = baseline["root_operator"], baseline["test_size"]
    share = root["accuracy"] / 100
    return BASELINE.format(
        answer=baseline["most_frequent"]["answer"],
        answers=", ".join(f"{name} {answer}" for name, answer in root["answers"].items()),
        size=size,
        error=100 * (share * (1 - share) / size) ** 0.5,
    )


def published() -> str:
    """The published table."""
    body = [
        [name, protocol, *(f"{value:.2f}" for value in values), f"{sum(values) / 5:.2f}"]
        for protocol, lines in PUBLISHED.items()
        for name, values in lines.items()
    ]
    header = ["attention", "protocol", "ListOps", "Text", "Retrieval", "Image", "Pathfinder"]
    align = ["left", "left"] + ["right"] * 6
    header += ["mean"]
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their task, in the order of the page."""
    found: dict[str, list[Row]] = {task: [] for task in TASKS}
    for row in rows:
        found[task_of_config(Path(row["config"]).name)].append(row)
    return found


def render(rows: Sequence[Row], baselines: Mapping[str, Row], times: Sequence[Row] = ()) -> str:
    """The page."""
    text = HEAD + (conditions(rows) if rows else EMPTY)
    for task, own in by_task(rows).items():
        baseline = baselines.get(task)
        if not own and not baseline:
            continue
        text += f"\n## {TASKS[task]}\n\n"
        if own:
            length = own[0]["scheduled_iterations"]
            text += f"The schedule has {length} iterations.\n\n"
        text += table(own, baseline) + (about(baseline) if baseline else "")
    if times:
        text += TIMES_HEAD + table_of_times(times)
    if rows:
        text += f"\n## Learning\n\n![Loss and accuracy](lra/{FIGURE.name})\n"
    return text + PUBLISHED_HEAD + published()


def learning(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, list]]]:
    """What the figure shows: task -> label -> curves of the seeds."""
    return {
        TASKS[task]: {
            f"{ATTENTIONS[attention][0]}, {iterations} iterations": dict(
                loss=[row["loss"] for row in group],
                accuracy=[row["validation"] for row in group],
            )
            for (attention, iterations), group in groups(own).items()
        }
        for task, own in by_task(rows).items()
        if own
    }


def digest_of_figure(rows: Sequence[Row]) -> str:
    """Of all that the figure shows; the file has it too, so that an old one is found."""
    return hashlib.sha256(json.dumps(learning(rows)).encode()).hexdigest()[:12]


def draw(rows: Sequence[Row], path: Path) -> None:
    """The figure of all runs."""
    from mmsoft.visualization import draw_learning, save_figure

    note = {NOTE: digest_of_figure(rows)}
    save_figure(draw_learning(learning(rows)), path, colours=64, metadata=note)


def stale(
    rows: Sequence[Row], baselines: Mapping[str, Row], times: Sequence[Row] = ()
) -> list[Path]:
    """Which of the page and its figure are not of these rows."""
    from PIL import Image

    found = []
    if not PAGE.exists() or PAGE.read_text() != render(rows, baselines, times):
        found.append(PAGE)
    if rows:
        noted = None
        if FIGURE.exists():
            with Image.open(FIGURE) as figure:
                noted = figure.info.get(NOTE)
        if noted != digest_of_figure(rows):
            found.append(FIGURE)
    return found


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and test one row")
    one.add_argument("config", type=Path, help="of configs/lra/")
    one.add_argument("--attention", choices=ATTENTIONS, default="soft++", help="default: soft++")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    one.add_argument("--iters", type=int, help="instead of the config's (the row's name says so)")
    one.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    turns = commands.add_parser("time", help="train attentions in turns and time iterations")
    turns.add_argument("config", type=Path, help="of configs/lra/")
    turns.add_argument("--attention", choices=ATTENTIONS, nargs="+", default=list(ATTENTIONS))
    turns.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    turns.add_argument("--rounds", type=int, default=3)
    turns.add_argument("--iters", type=int, default=12, help=f"of each run, over {WARM_UP}")
    turns.add_argument("--out", type=Path, default=TIMES, help="folder of the times")
    base = commands.add_parser("baselines", help="what is right without reading an expression")
    base.add_argument("task", choices=[task for task in TASKS if task.startswith("listops")])
    base.add_argument("data", type=Path, help="folder of the task's data")
    page = commands.add_parser("table", help="write docs/lra.md and its figure")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    args = parser.parse_args()
    try:
        if args.command in ("run", "time") and args.work_dir.exists():
            sys.exit(f"error: {args.work_dir} exists; name a new folder")
        if args.command == "run":
            row = (args.seed, args.work_dir, args.iters, args.out)
            print(run(args.config, args.attention, *row))
            return
        if args.command == "time":
            rounds = (args.work_dir, args.out, args.rounds, args.iters)
            samples = time_attentions(args.config, args.attention, *rounds)
            for attention, each in zip(args.attention, samples):
                print(f"{attention}: {statistics.median(each):.3f} s")
            return
        if args.command == "baselines":
            print(baselines(args.task, args.data, BASELINES))
            return
        rows, found, times = measured()
        if args.check:
            if old := stale(rows, found, times):
                names = ", ".join(str(path.relative_to(ROOT)) for path in old)
                sys.exit(f"stale: {names}; run python tools/dev/lra.py table")
            print("current")
            return
        text = render(rows, found, times)
    except (CommandError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with write_whole(PAGE) as partial:
        partial.write_text(text)
    if rows:
        draw(rows, FIGURE)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
