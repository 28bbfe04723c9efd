"""Rows of tables: a config trained and tested through mim, and what tables of them share."""

import hashlib
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmsoft.builder import build_model
from mmsoft.commands import read_scalars, train_and_test
from mmsoft.fileio import write_whole

FIELDS = (
    *("config", "seed", "commit", "iterations", "scheduled_iterations", "metrics", "parameters"),
    *("seconds_per_iteration", "training_seconds", "testing_seconds", "peak_bytes", "threads"),
    *("device", "versions"),
)

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
    timed: bool = True,
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
        timed: False where other work shares the machine: the row has but the seconds that both
            commands took there.
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
    seconds, total = timings(scalars, iterations)
    import torch  # seconds, which a table does without

    from mmsoft.benchmark.measure import device_name, versions

    row = dict(
        config=f"{path.absolute().parent.name}/{path.name}",
        digest=of_config,
        seed=seed,
        commit=version,
        iterations=iterations,
        scheduled_iterations=scheduled,
        metrics=done.metrics,
        parameters=sum(parameter.numel() for parameter in build_model(config).parameters()),
        seconds_per_iteration=round(seconds, 4) if timed else None,
        training_seconds=round(total, 1) if timed else None,
        testing_seconds=round(done.testing.seconds, 1) if timed else None,
        wall_seconds=round(done.training.seconds + done.testing.seconds),
        peak_bytes=done.training.peak_bytes,
        threads=torch.get_num_threads(),
        device=device_name("cpu"),
        versions={name: version for name, version in versions().items() if name in packages},
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
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            row = json.loads(path.read_text())
            if missing := [field for field in fields if field not in row]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            check(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a row of {tool}: {error}") from None
        rows.append(row)
    return rows


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
