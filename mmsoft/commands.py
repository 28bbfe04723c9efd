"""Commands of mim: ours, and the libraries' as the tools run them, with progress and costs."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmsoft.builder import require
from mmsoft.integration import LIBRARIES, check_library

PROGRESS = re.compile(r"INFO - (?:Epoch|Iter)\((train|val|test)\)\s+(.*)")
NOISE = re.compile(
    r"\b(lr|time|data_time|grad_norm|memory|base_lr|loss_\w+|(?:decode|aux)\.\w+): \S+\s*"
)


def run_of_library(script: str, description: str) -> None:
    """Run a script of the library that a config belongs to, with this program's arguments.

    Args:
        script: ``'train.py'`` or ``'test.py'``.
        description: printed where there are no arguments, or for ``-h``.
    """
    configs = [word for word in sys.argv[1:] if word.endswith(".py")]
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        print(f"usage: {script} CONFIG [options]\n\n{description}")
        return
    if not configs:
        sys.exit(f"error: no config among the arguments of {script}; its name ends in .py")
    # Another such word may be an option's, as the folder of --work-dir.
    path = next((word for word in configs if Path(word).is_file()), None)
    if path is None:
        sys.exit(f"error: no config {configs[0]}")
    try:
        library = Config.fromfile(path).get("default_scope")
    except ImportError as error:  # it inherits from a library that is not there
        sys.exit(f"error: {path}: {error}")
    if library not in LIBRARIES:
        sys.exit(
            f"error: the default_scope of {path} is {library!r}, which should be one of "
            f"{', '.join(LIBRARIES)}: inherit from a config of one of them, or of mmsoft"
        )
    try:
        require(library)
        check_library(library)
    except ImportError as error:
        sys.exit(f"error: {error}")
    spec: Any = find_spec(library)
    folder = spec.submodule_search_locations[0]
    runpy.run_path(str(Path(folder, ".mim", "tools", script)), run_name="__main__")


class CommandError(Exception):
    """A command failed; the message is one line and names its log."""


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds, and the resident memory of its largest process at its peak.

    Linux counts what the caller held when it started the command as the command's: no less.
    """

    seconds: float
    peak_bytes: int


def mim(title: str, arguments: Sequence[str], log: Path, folder: Path) -> Usage:
    """Run a `mim` command in ``folder``: its output to ``log``, its progress here.

    Raises:
        CommandError: it failed.
    """
    print(f"\n== {title}\n   $ mim {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-u", "-m", "mim", *arguments]
    last_error = ""
    start = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if match := PROGRESS.search(line):
                phase, rest = match.groups()
                print(f"   {phase:5} {re.sub(r' {2,}', '  ', NOISE.sub('', rest))}", flush=True)
            elif re.match(r"\S*Error\b", line) and "CalledProcessError" not in line:
                last_error = f": {line.strip()}"
        # Unlike Popen.wait, this tells the memory of the process and of its descendants.
        _, status, resources = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise CommandError(f"`mim {shlex.join(arguments[:3])} ...` failed{last_error} (see {log})")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(time.monotonic() - start, resources.ru_maxrss * unit)


@dataclass(frozen=True)
class Run:
    """A model trained and tested: the test's metrics, under MMEngine's names, and the costs."""

    metrics: dict[str, float]
    training: Usage
    testing: Usage


def train_and_test(
    name: str,
    arguments: Sequence[str],
    work_dir: Path,
    folder: Path,
    training: Sequence[str] = (),
    testing: Sequence[str] = (),
) -> Run:
    """Run `mim train` and `mim test` in ``folder``.

    Args:
        name: what the progress calls the model.
        arguments: of both commands: package, config, options.
        work_dir: a new folder in ``folder`` for the logs and the checkpoint.
        folder: where both run.
        training: more arguments of `mim train`.
        testing: more arguments of `mim test`.

    Raises:
        CommandError: one of them failed.
    """
    work_dir.mkdir(parents=True)
    common = [*arguments, "--work-dir", os.path.relpath(work_dir, folder)]
    log = work_dir / "train.log"
    trained = mim(f"{name}: training", ["train", *common, *training], log, folder)
    checkpoint = os.path.relpath((work_dir / "last_checkpoint").read_text(), folder)
    extra = ["--checkpoint", checkpoint, *testing]
    log = work_dir / "test.log"
    tested = mim(f"{name}: testing", ["test", *common, *extra], log, folder)
    # MMEngine names the folder of a run by the time: the last one is the test's.
    report = json.loads(max(work_dir.glob("*/*.json")).read_text())
    metrics = {key: value for key, value in report.items() if key not in ("time", "data_time")}
    return Run(metrics, trained, tested)


def read_scalars(work_dir: Path) -> list[dict]:
    """What the training in ``work_dir`` logged, one dict for each entry."""
    text = min(work_dir.glob("*/vis_data/scalars.json")).read_text()
    return [json.loads(line) for line in text.splitlines()]
