"""Rows of tables: configs trained, tested and timed through mim, and what tables of them share."""

import hashlib
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmsoft.builder import build_model
from mmsoft.commands import CommandError, mim, read_scalars, train_and_test
from mmsoft.fileio import write_whole

FIELDS = (
    *("config", "seed", "commit", "iterations", "scheduled_iterations", "metrics", "parameters"),
    *("peak_bytes", "threads", "device", "versions"),
)

NO_VALIDATION = ("val_cfg=None", "val_dataloader=None", "val_evaluator=None")
WARM_UP = 2  # iterations of a run that are not timed

Row = dict[str, Any]


def schedule(config: Config, iterations: int) -> list[str]:
    """Changes that make ``iterations`` of a config's schedule; the warm-up keeps its length.

    Raises:
        ValueError: there are not more iterations than those of the warm-up.
    """
    end = config.train_cfg.max_iters
    warmup = max(scheduler.get("begin", 0) for scheduler in config.param_scheduler)
    if iterations <= warmup:
        raise ValueError(f"iterations must be more than the warm-up's {warmup}, got {iterations}")
    changes = [f"train_cfg.max_iters={iterations}"]
    for number, scheduler in enumerate(config.param_scheduler):
        if scheduler.end == end:
            changes.append(f"param_scheduler.{number}.end={iterations}")
    return changes


def commit(root: Path) -> str:
    """The commit of a checkout, "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def digest(config: Config) -> str:
    """Of all that a config says, its bases included: other settings have another one.

    Whether the optimizer is fused depends on torch's version and is left out.
    """
    content = config.to_dict()
    content.get("optim_wrapper", {}).get("optimizer", {}).pop("fused", None)
    text = json.dumps(content, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure_row(
    config: Config,
    name: str,
    work_dir: Path,
    out: Path,
    *,
    root: Path,
    seed: int,
    iterations: int | None = None,
    changes: Iterable[str] = (),
    training: Iterable[str] = (),
    testing: Iterable[str] = (),
    packages: Iterable[str] = (),
    extra: Callable[[list[Row]], Row] = lambda scalars: {},
) -> Path:
    """Train and test a config in the current folder, and write its row when both have ended.

    Args:
        config: read from its file, with the changes of the model.
        name: of the row, before what is said of schedule and seed.
        work_dir: a new folder for the logs.
        out: folder of the rows.
        root: of the checkout.
        seed: of weights and order.
        iterations: instead of the config's; the row's name says so.
        changes: ``--cfg-options`` of ``mim train`` and ``mim test``.
        training: more of them, of ``mim train`` alone.
        testing: other arguments of ``mim test``.
        packages: whose versions belong to the row.
        extra: what else belongs to it, from the entries of the training's log.

    Returns:
        The row's file.

    Raises:
        CommandError: training or testing failed.
    """
    path = Path(config.filename)
    scheduled = config.train_cfg.max_iters
    iterations = scheduled if iterations is None else iterations
    training = [f"randomness.seed={seed}", *training]
    if iterations != scheduled:
        training += schedule(config, iterations)
        name = f"{name}_{iterations}-iterations"
    name = f"{name}_seed{seed}"
    version = commit(root)  # of the files that are about to run
    of_config = digest(config)
    changes = list(changes)
    done = train_and_test(
        name,
        [config.default_scope, str(path), "--gpus", "0"],
        work_dir.absolute(),
        Path.cwd(),
        training=["--cfg-options", *changes, *training],
        testing=[*testing, *(["--cfg-options", *changes] if changes else [])],
    )
    scalars = read_scalars(work_dir)
    import torch  # seconds, which a table does without

    from mmsoft.benchmark.measure import device_name

    row = dict(
        config=name_of(path),
        digest=of_config,
        seed=seed,
        commit=version,
        iterations=iterations,
        scheduled_iterations=scheduled,
        metrics=done.metrics,
        parameters=sum(parameter.numel() for parameter in build_model(config).parameters()),
        wall_seconds=round(done.training.seconds + done.testing.seconds),
        peak_bytes=done.training.peak_bytes,
        threads=torch.get_num_threads(),
        device=device_name("cpu"),
        versions=_versions(packages),
        **extra(scalars),
    )
    target = out / f"{name}.json"
    with write_whole(target) as partial:
        partial.write_text(json.dumps(row, indent=1) + "\n")
    return target


def read_rows(folder: Path, tool: str, check: Callable[[Row], Any], fields: Sequence[str]) -> list:
    """All rows of a folder, in the order of their names.

    Raises:
        ValueError: naming the file that is not one.
    """
    return [_read(path, tool, check, fields) for path in sorted(folder.glob("*.json"))]


def _read(path: Path, tool: str, check: Callable[[Row], Any], fields: Sequence[str]) -> Row:
    try:
        row = json.loads(path.read_text())
        if missing := [field for field in fields if field not in row]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        check(row)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of {tool}: {error}") from None
    return row


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and of several the lowest and the highest."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


@dataclass(frozen=True)
class Subject:
    """A config that is timed, with changes; and what else its times say of it."""

    name: str
    config: Path
    changes: Sequence[str] = ()
    extra: Row = field(default_factory=dict)


def time_in_turns(
    subjects: Sequence[Subject],
    work_dir: Path,
    target: Path,
    rounds: int,
    iterations: int,
    *,
    root: Path,
    packages: Iterable[str] = (),
) -> list[list[float]]:
    """Train in turns, in the current folder, and write the seconds that iterations of each took.

    A round is of one seed: all see the same batches. The first :data:`WARM_UP` iterations of a run
    are left out.

    Args:
        subjects: with a name each.
        work_dir: a new folder for the logs.
        target: one file for all, because ratios of seconds from two days are those of the days.
        rounds: runs of each subject.
        iterations: of a run.
        root: of the checkout.
        packages: whose versions belong to the times.

    Returns:
        Seconds of the iterations, by subject.

    Raises:
        CommandError: a training failed; nothing has been written then.
        ValueError: before any work: no iteration would be left, two subjects have one name, or
            ``target`` has times of others, which would be lost.
    """
    if iterations <= WARM_UP or rounds < 1:
        least = f"at least 1 round of at least {WARM_UP + 1} iterations"
        raise ValueError(f"times need {least}, got {rounds} of {iterations}")
    names = [subject.name for subject in subjects]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"to be timed more than once: {', '.join(sorted(twice))}")
    if target.exists():
        there = {each["name"] for each in json.loads(target.read_text())["timed"]}
        if lost := sorted(there - set(names)):
            raise ValueError(
                f"{target} has times of {', '.join(lost)}, which would be lost: time them too, or "
                "write elsewhere with --out"
            )
    samples: list[list[float]] = [[] for _ in subjects]
    peaks = [0] * len(subjects)
    version = commit(root)
    turns = list(enumerate(subjects))
    for number in range(rounds):
        for place, subject in turns[:: -1 if number % 2 else 1]:  # neighbours and ends change
            config = Config.fromfile(subject.config, import_custom_modules=False)
            folder = (work_dir / f"{subject.name}_{number}").absolute()
            folder.mkdir(parents=True)
            changes = [f"train_cfg.max_iters={iterations}", "default_hooks.logger.interval=1"]
            changes.append("log_processor.window_size=1")  # times, not means over those before
            changes += ["default_hooks.checkpoint=None", f"randomness.seed={number}"]
            changes += [*NO_VALIDATION, *subject.changes]
            command = ["train", config.default_scope, str(subject.config), "--gpus", "0"]
            command += ["--work-dir", str(folder), "--cfg-options", *changes]
            title = f"{subject.name}, {number + 1} of {rounds}"
            usage = mim(title, command, folder / "train.log", Path.cwd())
            peaks[place] = max(peaks[place], usage.peak_bytes)
            measured = [entry["time"] for entry in read_scalars(folder) if "loss" in entry]
            if len(measured) != iterations:
                raise CommandError(f"{len(measured)} iterations in the log of {folder}")
            samples[place] += measured[WARM_UP:]
    import torch  # seconds, which a table does without

    from mmsoft.benchmark.measure import device_name

    timed = [
        dict(
            name=subject.name,
            config=name_of(subject.config),
            **subject.extra,
            peak_bytes=peak,
            seconds=[round(time, 4) for time in times],
        )
        for subject, times, peak in zip(subjects, samples, peaks)
    ]
    where = dict(
        commit=version,
        device=device_name("cpu"),
        threads=torch.get_num_threads(),
        versions=_versions(packages),
    )
    with write_whole(target) as partial:
        partial.write_text(json.dumps(dict(where, timed=timed), indent=1) + "\n")
    return samples


def read_times(folder: Path, tool: str, check: Callable[[Row], Any]) -> list[Row]:
    """What :func:`time_in_turns` has written: each subject's, with where it was measured.

    ``session`` is the name of the file: of one session are the subjects that took turns.

    Raises:
        ValueError: naming the file that is not one, or the subject that is in two.
    """

    def check_all(session: Row) -> None:
        if not session["timed"]:
            raise ValueError("nothing was timed")
        for each in session["timed"]:
            if missing := [key for key in ("name", "config", "seconds") if not each.get(key)]:
                raise ValueError(f"a subject lacks {', '.join(missing)}")
            if not all(isinstance(time, int | float) and time > 0 for time in each["seconds"]):
                raise ValueError(f"seconds of {each['name']} are not positive numbers")
            check(each)

    found: dict[str, Row] = {}
    for path in sorted(folder.glob("*.json")):
        where = _read(path, tool, check_all, ("commit", "device", "threads", "timed"))
        for each in where.pop("timed"):
            if (name := each["name"]) in found:
                raise ValueError(f"{name} was timed in {found[name]['session']} and in {path.stem}")
            found[name] = {**each, **where, "session": path.stem}
    return list(found.values())


def short(commit: str) -> str:
    """Of a commit as rows have it: seven digits, and whether files differed."""
    return commit[:7] + "-dirty" * commit.endswith("-dirty")


def seconds(value: float | None) -> str:
    """Three digits; "-" for what was not measured."""
    return "-" if value is None else f"{value:.{2 if value < 10 else 0}f}"


def seconds_of(times: Row | None) -> str:
    """The median of what was timed, and both quartiles in parentheses."""
    if times is None:
        return "-"
    text = seconds(statistics.median(times["seconds"]))
    if len(times["seconds"]) < 4:
        return text
    low, _, high = statistics.quantiles(times["seconds"], n=4)
    return f"{text} ({seconds(low)}-{seconds(high)})"


def conditions(rows: Sequence[Row]) -> str:
    """Where and with what the rows were measured."""
    devices = sorted({f"{row['device']}, {_count(row['threads'], 'thread')}" for row in rows})
    versions: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, version in row["versions"].items():
            versions[name].add(version)
    used = ", ".join(f"{name} {' and '.join(sorted(versions[name]))}" for name in versions)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"\n{'; '.join(devices)}; {used}; commit {commits}.\n"


def _versions(packages: Iterable[str]) -> dict[str, str]:
    from mmsoft.benchmark.measure import versions

    wanted = set(packages)
    return {name: version for name, version in versions().items() if name in wanted}


def name_of(config: Path) -> str:
    """A config as rows have it: its folder and file."""
    return f"{config.absolute().parent.name}/{config.name}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
