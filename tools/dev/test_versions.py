#!/usr/bin/env python
"""Run the tests that depend on torch, and a detector's training step, on several torch.

    python tools/dev/test_versions.py                  # every row whose Python is at hand
    python tools/dev/test_versions.py 2.1.2 --jobs 1   # one, compiling mmcv with one process
    python tools/dev/test_versions.py --lite           # no compiling, and no training step

Each row gets an environment of its own below `--folder`, which is kept until other versions are
asked for: torch, NumPy and what the tests need from the package index, mmcv compiled against that
torch. That takes minutes and gigabytes for each; PyPI's torch is a CUDA build. The table in
`docs/installation.md` is written from what was run, with the commit; what was not run keeps its
result. The exit status is the number of rows that did not pass, and 1 if none was run.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE_IN_GIT = "docs/installation.md"
PAGE = ROOT / PAGE_IN_GIT
CONFIG = "configs/demo/retinanet_softpp-mini_fpn_shapes.py"
# Operators, models, and what reads checkpoints otherwise on torch before 2.6.
TESTS = (
    "tests/ops",
    "tests/models",
    "tests/test_checkpoint.py",
    "tests/faults/test_untrusted_files.py",
)
NOT_RUN = "not run"
NO_COMMIT = "-"
# Python, torch, NumPy: the oldest that are supported, those in between, the newest.
ROWS = (
    ("3.10", "2.1.2", "1.26.4"),
    ("3.11", "2.4.1", "1.26.4"),
    ("3.10", "2.6.0", "2.2.6"),
    ("3.11", "2.13.0", "2.4.6"),
    ("3.12", "2.15.0", "2.4.6"),
)
# mmcv's set-up asks for C++17, which the headers of torch refuse since 2.15.
NEEDS_CPP20 = "torch==2.15.0"
CPP20 = """#!/bin/bash
exec g++ "${@/-std=c++17/-std=c++20}"
"""
PACKAGES = (
    "hypothesis", "loralib", "mmengine==0.10.7", "opencv-python-headless<5", "opencv-python<5",
    "packaging", "pytest", "tabulate",
)  # fmt: skip
COLUMNS = ("Python", "torch", "NumPy", "tests", "training step of a detector", "commit")


class RowError(Exception):
    """A row could not be run; the message is one line."""


class NoPythonError(RowError):
    """There is no interpreter for a row, which is then left out."""


def find_python(version: str) -> str:
    """An interpreter of this version: on the path, or pyenv's.

    Raises:
        NoPythonError: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found = [str(p) for p in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in (f"python{version}", *found):
        path = shutil.which(candidate)
        command = [str(path), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        if (
            path
            and subprocess.run(command, capture_output=True, text=True).stdout.strip() == version
        ):
            return path
    raise NoPythonError(f"no Python {version}: left out")


def call(command: list[str], log: Path, **environment: str) -> tuple[int, str]:
    """Run a command, its output to the log's end; gives status and output."""
    cleared = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**cleared, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    return done.returncode, done.stdout


def plan(torch: str, numpy: str, lite: bool) -> dict[str, list[str]]:
    """What pip is asked for, by step; if ``lite``, mmcv-lite and no MMDetection."""
    pins = [f"torch=={torch}", f"numpy=={numpy}"]
    steps = {
        "torch": [*pins, "setuptools==79.0.1", "wheel", "ninja"],
        "packages": [*pins, *PACKAGES],
    }
    if lite:
        return {**steps, "mmcv-lite": [*pins, "mmcv-lite==2.1.0"]}
    mmcv = ["--no-cache-dir", "--no-deps", "--no-build-isolation", "mmcv==2.1.0"]
    return {**steps, "mmdet": [*pins, "mmdet==3.3.0"], "mmcv": mmcv}


def name_of(version: str, torch: str, numpy: str, lite: bool) -> str:
    """Of the row's environment: another one for other packages."""
    digest = hashlib.sha256(repr(plan(torch, numpy, lite)).encode()).hexdigest()
    return f"py{version}-torch{torch}{'-lite' if lite else ''}-{digest[:8]}"


def build(folder: Path, python: str, steps: dict[str, list[str]], jobs: int, log: Path) -> str:
    """Make the environment, or go on where it was left; gives its Python.

    Raises:
        RowError: a step failed.
    """
    inside = str(folder / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    compiling = dict(CFLAGS="-g0", CXXFLAGS="-g0", MAX_JOBS=str(jobs), MMCV_WITH_OPS="1")
    compiling.update(FORCE_CUDA="0", CUDA_VISIBLE_DEVICES="")
    if NEEDS_CPP20 in steps["torch"]:
        compiling["CXX"] = str(folder / "c++20")
    commands = {"venv": [python, "-m", "venv", str(folder)]}
    commands.update({name: [*pip, *packages] for name, packages in steps.items()})
    for name, command in commands.items():
        mark = folder / f"done-{name}"
        if not mark.exists():
            print(f"   {name}", flush=True)
            if name == "mmcv" and "CXX" in compiling:
                Path(compiling["CXX"]).write_text(CPP20)
                Path(compiling["CXX"]).chmod(0o755)
            status, _ = call(command, log, **(compiling if name == "mmcv" else {}))
            if status:
                raise RowError(f"`{' '.join(command[1:4])} ...` failed, see {log}")
            mark.touch()
    return inside


def run_tests(python: str, log: Path) -> tuple[str, bool]:
    """Run the tests; gives what came of them, and whether they ran and passed."""
    environment = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    status, output = call([*command, *TESTS], log, **environment)
    last = (output.strip().splitlines() or [""])[-1]  # "1 failed, 2 passed in 3.45s"
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", last)
    if status and not any("failed" in count or "error" in count for count in counts):
        counts.append(f"stopped with status {status}")
    passed = status == 0 and any("passed" in count for count in counts)
    return ", ".join(counts) or "none ran", passed


def run_step(python: str, log: Path) -> str:
    """Run the training step; gives what came of it."""
    environment = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [python, "tests/helpers/train_step.py", "mmdet", CONFIG]
    status, output = call(command, log, **environment)
    return "passed" if status == 0 and '"problems": []' in output else "failed"


def commit() -> str:
    """The commit of the checkout, "-dirty" if files other than the page differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git") or not (name := git("rev-parse", "--short=9", "HEAD")):
        return NO_COMMIT
    changed = git("status", "--porcelain", "--", ".", f":!{PAGE_IN_GIT}")
    return f"{name}-dirty" if changed else name


def row_of(cells: list[str]) -> str:
    """A row of the table."""
    return f"| {' | '.join(cells)} |"


def read_results(text: str) -> dict[str, list[str]]:
    """The results on the page: torch -> the cells of its row, older ones without a commit."""
    table = re.search("<!-- versions -->\n\n(.*?)\n<!-- /versions -->", text, re.DOTALL)
    lines = table[1].splitlines()[2:] if table else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    return {row[1]: row + [NO_COMMIT] * (len(COLUMNS) - len(row)) for row in rows}


def write_results(results: dict[str, list[str]]) -> None:
    """Write the table into the page, whole."""
    rows = [results.get(t, [p, t, n, NOT_RUN, NOT_RUN, NO_COMMIT]) for p, t, n in ROWS]
    table = "\n".join(map(row_of, [list(COLUMNS), ["---"] * len(COLUMNS), *rows]))
    text = PAGE.read_text()
    before, rest = text.split("<!-- versions -->")
    *_, after = rest.split("<!-- /versions -->")
    partial = PAGE.with_suffix(".partial")
    partial.write_text(f"{before}<!-- versions -->\n\n{table}\n\n<!-- /versions -->{after}")
    partial.replace(PAGE)


def main() -> int:
    """Run the command line; the number of rows that did not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torch", nargs="*", help="versions of torch, of the rows of the table")
    parser.add_argument("--lite", action="store_true", help="mmcv-lite: nothing is compiled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="to compile mmcv with")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/mmsoft/versions")
    args = parser.parse_args()
    if unknown := set(args.torch) - {torch for _, torch, _ in ROWS}:
        parser.error(f"no row for torch {', '.join(sorted(unknown))}")
    failed, tried, tested = 0, 0, commit()
    for version, torch, numpy in ROWS:
        if args.torch and torch not in args.torch:
            continue
        print(f"== Python {version}, torch {torch}, NumPy {numpy}", flush=True)
        folder = args.folder / name_of(version, torch, numpy, args.lite)
        log = args.folder / f"{folder.name}.log"
        args.folder.mkdir(parents=True, exist_ok=True)
        tests, step, passed = "build failed", NOT_RUN, False
        try:
            steps = plan(torch, numpy, args.lite)
            python = build(folder, find_python(version), steps, args.jobs or 1, log)
        except NoPythonError as error:
            print(f"   {error}", flush=True)
            continue
        except RowError as error:
            print(f"   {error}", flush=True)
        else:
            tests, passed = run_tests(python, log)
            if not args.lite:
                step = run_step(python, log)
                passed &= step == "passed"
        if args.lite:
            tests += ", with mmcv-lite"
        print(f"   {tests}; training step {step}", flush=True)
        tried, failed = tried + 1, failed + (not passed)
        row = [version, torch, numpy, tests, step, tested]
        write_results({**read_results(PAGE.read_text()), torch: row})
    if not tried:
        print("no row was run", flush=True)
    return failed if tried else 1


if __name__ == "__main__":
    sys.exit(main())
