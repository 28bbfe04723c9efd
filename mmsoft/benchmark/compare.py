"""Compare the speed of the working tree with that of a commit, both in turns in one run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
CASES: tuple[dict[str, Any], ...] = (
    dict(section="backbone", name="softpp-tiny", size=[224, 224]),
    dict(section="backbone", name="softpp-small", size=[224, 224]),
    dict(section="backbone", name="softpp-tiny", size=[800, 1344]),
    dict(section="backbone", name="softpp-tiny", size=[800, 1344], dtype="bfloat16"),
    dict(section="backbone", name="softpp-tiny", size=[512, 512], batch=2, mode="train"),
    dict(section="backbone", name="softpp-tiny-newton", size=[512, 512]),
    dict(section="operator", name="softpp", size=[128, 128]),
)
NOISY = 0.1  # more noise than that hides what a guard is for
ANSWER = "@@"
# Runs in either tree, so it knows what both have alone: reads a case's number, answers seconds.
WORKER = f"""
import json, logging, sys, time, warnings
import torch
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
from mmsoft.benchmark.cases import Case, make_model, make_step
cases, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
steps = []
for each in cases:
    case = Case(**{{**each, "size": tuple(each["size"])}})
    step = make_step(make_model(case), case)
    step()
    start = time.perf_counter()
    step()
    calls = min(max(round(0.05 / (time.perf_counter() - start)), 1), 50)
    steps.append((step, calls))
print("{ANSWER}", flush=True)
for line in sys.stdin:
    step, calls = steps[int(line)]
    start = time.perf_counter()
    for _ in range(calls):
        step()
    print("{ANSWER}", (time.perf_counter() - start) / calls, flush=True)
"""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip()
        raise ValueError(f"{' '.join(command[3:])} failed: {reason}")
    return done.stdout.strip()


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A checkout of a commit, usable like an editable installation; removed afterwards.

    Raises:
        ValueError: there is no such commit, or the package was not installed from a checkout.
    """
    name = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    with TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), name)
        try:
            links = tree / "mmsoft" / ".mim"
            links.mkdir(exist_ok=True)
            for link in ("configs", "tools", "model-index.yml"):
                (links / link).symlink_to(tree / link)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


class Worker:
    """A process that has the cases ready, of one tree."""

    def __init__(self, tree: Path, cases: Sequence[Mapping[str, Any]], threads: int):
        arguments = [sys.executable, "-c", WORKER, json.dumps([list(cases), threads])]
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS=str(threads))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            arguments, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def answer(self) -> str:
        """What it says next.

        Raises:
            ValueError: it ended.
        """
        for line in self.process.stdout or ():
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).strip()
        raise ValueError("a measuring process failed, see above")

    def seconds(self, case: int) -> float:
        """Run a case, by its number."""
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return float(self.answer())

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def verdict(tree: np.ndarray, commit: np.ndarray, again: np.ndarray) -> tuple[float, float, str]:
    """The change of the time, the noise, both as shares, and what they mean.

    Ratios are of a round, so that what slows all of a round does not count.

    Args:
        tree: seconds of the rounds ``[n]``.
        commit: likewise.
        again: likewise, of a second process of the commit, which differs by noise alone.

    Returns:
        The last is "slower", "faster", "same", or "too noisy" if more than ``NOISY`` would go
        unnoticed.
    """
    changes = tree / ((commit + again) / 2)
    change = float(np.median(changes) - 1)
    between = abs(float(np.median(again / commit) - 1))
    # Twice the standard error of a median, from the quartiles.
    span = float(np.subtract(*np.quantile(changes, (0.75, 0.25))))
    noise = max(between, 2 * 1.25 * span / 1.35 / len(tree) ** 0.5)
    word = "slower" if change > noise else "faster" if change < -noise else "same"
    return change, noise, "too noisy" if word == "same" and noise > NOISY else word


def compare(
    commit: str, rounds: int, threads: int, cases: Sequence[Mapping[str, Any]] = CASES
) -> bool:
    """Print what got slower or faster than a commit.

    Returns:
        Whether nothing got slower; False as well where the machine was too noisy to tell.

    Raises:
        ValueError: the commit cannot be checked out, or a tree cannot run a case.
    """
    with ExitStack() as stack:
        other = stack.enter_context(tree_of(commit))
        workers = []
        for tree in (ROOT, other, other):
            workers.append(Worker(tree, cases, threads))
            stack.callback(workers[-1].stop)
            workers[-1].answer()  # ready: one after another, so that none disturbs another
        samples = np.empty((len(workers), len(cases), rounds))
        for turn in range(rounds):
            for number in range(len(cases)):
                for place in np.roll(range(len(workers)), turn):
                    samples[place, number, turn] = workers[place].seconds(number)
            print(f"   round {turn + 1} of {rounds}", flush=True)
    rows, fine = [], True
    for number, case in enumerate(cases):
        change, noise, word = verdict(*samples[:, number])
        fine &= word not in ("slower", "too noisy")
        words = [case["name"], "x".join(map(str, case["size"])), case.get("mode", "forward")]
        words += [f"batch {case.get('batch', 1)}", case.get("dtype", "float32")]
        times = (f"{1e3 * np.median(samples[place, number]):.1f}" for place in (1, 0))
        rows.append(
            [", ".join(words), *times, f"{100 * change:+.1f} %", f"{100 * noise:.1f} %", word]
        )
    head = ["", f"{commit}, ms", "working tree, ms", "change", "noise", ""]
    print(tabulate(rows, head, "github", disable_numparse=True))
    if any(row[-1] == "too noisy" for row in rows):
        print("\ntoo noisy: what got slower there cannot be told; repeat it on an idle machine")
    return fine
