"""Everything that needs a GPU, in nine minutes: tests, kernels, backbones, training.

    make gpu                                      # on a machine with a GPU
    make gpu WHEELS=FOLDER                        # on a bare one, with torch and a folder of wheels
    make gpu OUT=FOLDER                           # results there
    python tools/dev/gpu.py --dry-run             # the same steps on a CPU, with small sizes
    TRITON_INTERPRET=1 python tools/dev/gpu.py --dry-run    # and with kernels: minutes more

Each step runs by itself, up to a limit of its own: one that fails or is stopped there does not stop
the next, and what it had measured is kept; the last has all the time that is left. Everything goes
to work_dirs/gpu: `gpu.json`, which says of each step how it ended and what it left out, a log for
each, `kernels.json`, and `benchmark.json` in folders of the three steps of backbones, which `python
-m mmsoft.benchmark --write-docs` takes; at the end `results.tar.gz` has all of these. The exit
status is 0 if every step was complete.

A bare machine has Python, torch and its companions. In the folder of wheels there must be those of
requirements/gpu/packages.txt, and mmcv with CUDA operators.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import signal
import site
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SECONDS, START = 540, 20  # of all, and of them before the first step
DRY = 10  # times as long may a step of the dry run take
GRACE = 5.0  # seconds beyond its limit in which a stopped step can say what it has found
MODES = ("forward", "train")
MODELS = (
    *("softpp-tiny", "softpp-small", "pvtv2-b1", "pvtv2-b2", "swin-tiny"),
    *("convnext-tiny", "convnext-tiny-channels-last", "released-tiny"),
)
# A kernel that fails may take all that runs after it in its process with it.
# By content the choice alone has a kernel; with released landmarks the products and the inverse.
WITH_KERNELS = (
    *("softpp-tiny-triton", "softpp-small-triton"),
    *("softpp-tiny-direct-49", "softpp-tiny-direct-49-triton"),
)
OF_KERNELS = ["tests/ops/test_kernels.py", "tests/models/test_gpu.py"]


@dataclass
class Step:
    """A command, the seconds until it is stopped, and where it runs."""

    name: str
    command: list[str]
    limit: int
    folder: Path = ROOT
    results: Path | None = None  # JSON, which says what was left out


def steps(out: Path, dry: bool) -> list[Step]:
    """All steps, the most important first."""
    python, device = sys.executable, "cpu" if dry else "cuda"
    golden = ["tests/models/test_golden.py"]
    tests = ["tests/models", "tests/ops", "tests/faults/test_fuzz.py"]
    tests += [f"--ignore={path}" for path in (*golden, *OF_KERNELS)]
    kernel_tests = [*OF_KERNELS]
    kernels = ["--repeats", "5"]
    # The size that the targets are about first; the least that a quantile can be taken of.
    backbones = ["--models", *MODELS, "--sizes", "800x1344", "512", "224", "--batch", "2", "16"]
    backbones += ["128", "--modes", *MODES, "--dtypes", "float32", "tf32", "bfloat16"]
    backbones += ["--repeats", "3", "--slow-repeats", "5"]
    # All of them again: those that are compared are measured in turns.
    triton = ["--models", *MODELS, *WITH_KERNELS, "--sizes", "800x1344", "--batch", "2"]
    triton += ["--modes", *MODES, "--dtypes", "bfloat16", "float32", "--slow-repeats", "5"]
    # To compile a model takes up to a minute, and a group is written when all of it is measured.
    compiled = ["--models", "softpp-tiny", "pvtv2-b1", "--sizes", "800x1344", "--batch", "2"]
    compiled += ["--modes", *MODES, "--dtypes", "bfloat16", "--compile", "only", "--repeats", "5"]
    data = ["--train", "80", "--val", "8"]
    training = ["--gpus", "1", "--amp"]
    small: list[str] = []
    if dry:
        tests = ["tests/ops/test_backends.py", "-k", "unknown_names"]
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        some_tests = "refusals_say_why" + (" or strided_and" if interpreted else "")
        kernel_tests = [OF_KERNELS[0], "-k", some_tests]
        kernels = ["--tokens", "64", "--landmarks", "5", "--repeats", "2"]
        golden += ["-k", "outputs and soft-wellcond and 160"]
        triton = ["--models", "softpp-tiny", "softpp-tiny-triton", "--sizes", "32"]
        triton += ["--repeats", "1"]
        backbones = ["--models", "softpp-tiny", "--sizes", "32", "--batch", "2"]
        backbones += ["--modes", *MODES, "--repeats", "1", "--dtypes", "tf32", "bfloat16"]
        compiled = ["--models", "softpp-tiny", "--sizes", "32", "--repeats", "1"]
        compiled += ["--compile", "only", "--dtypes", "bfloat16"]
        for some in (backbones, triton, compiled):  # beside other processes more would wait
            some += ["--threads", "1"]
        data = ["--train", "12", "--val", "4", "--size", "64"]
        training, small = ["--gpus", "0"], ["train_dataloader.dataset.indices=4"]
    if importlib.util.find_spec("xdist") and not dry:
        workers = str(min(14, max(1, (os.cpu_count() or 1) - 2)))
        for some in (tests, kernel_tests):
            some += ["-n", workers]
    common = ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
    common += ["val_dataloader.dataset.indices=2", *small]

    def train(library: str, config: str, length: str) -> list[str]:
        path = ROOT / "configs/demo" / f"{config}.py"
        command = [python, "-m", "mim", "train", library, str(path), *training]
        return [*command, "--work-dir", str(out / config), "--cfg-options", length, *common]

    make = [python, str(ROOT / "tools/dataset_converters/make_shapes.py"), "data/shapes", *data]
    detector = train("mmdet", "mask-rcnn_softpp-mini_fpn_shapes", "train_cfg.max_epochs=1")
    segmentor = train(
        "mmseg", "upernet_softpp-mini_shapes", f"train_cfg.max_iters={2 if dry else 60}"
    )
    pytest = [python, "-m", "pytest", "-v", f"--device={device}"]  # a line for each, as it ends
    # MMEngine's AMP is for GPUs: elsewhere these are skipped.
    amp = ["-m", "long", "-k", "amp", "tests/faults/test_low_precision.py"]
    time_kernels = [python, "-m", "mmsoft.benchmark.kernels", "--device", device, "--out", str(out)]
    preflight = [python, str(ROOT / "tools/dev/preflight.py"), "--device", device]

    def benchmark(name: str, arguments: list[str], limit: int) -> Step:
        command = [python, "-m", "mmsoft.benchmark", "--device", device, "--out", str(out / name)]
        return Step(name, [*command, *arguments], limit, results=out / name / "benchmark.json")

    return [
        Step("preflight", preflight, 25),
        Step("golden", [*pytest, *golden], 20),
        Step("tests", [*pytest, *tests], 75),
        Step("kernel-tests", [*pytest, *kernel_tests], 75),
        Step("kernels", [*time_kernels, *kernels], 75, results=out / "kernels.json"),
        Step("data", make, 15, out),
        Step("detector", detector, 40, out),
        Step("segmentor", segmentor, 40, out),
        benchmark("backbones", backbones, 80),
        benchmark("triton", triton, 40),
        Step("amp", [*pytest, *amp], 25),
        benchmark("compiled", compiled, 10),
    ]


def pip_install(*arguments: str) -> bool:
    """Whether pip, which asks no index, could; its error is one line."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    # An operating system may have marked its Python as its own.
    environment = dict(os.environ, PIP_BREAK_SYSTEM_PACKAGES="1")
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        print(f"pip install {arguments[-1]}: {lines[-1] if lines else 'failed'}", flush=True)
    return done.returncode == 0


def install(wheels: Path) -> None:
    """Install those of a folder of wheels whose distributions are missing, and this checkout.

    Setuptools also in place of another version: MMEngine and MIM need what 82 has no longer.
    """
    missing = []
    for name, version in sorted({tuple(path.name.split("-")[:2]) for path in wheels.glob("*.whl")}):
        there = next(iter(metadata.distributions(name=name)), None)
        if there is None or (name == "setuptools" and there.version != version):
            missing.append(f"{name}=={version}")
    every = ["--find-links", str(wheels.resolve())]
    if missing and not pip_install(*every, *missing):  # all or none: then one after the other
        for name in missing:
            pip_install(*every, name)
    pip_install("--no-build-isolation", "-e", str(ROOT))
    if site.ENABLE_USER_SITE:  # where pip installs what it may not install for all, new perhaps
        site.addsitedir(site.getusersitepackages())
    importlib.invalidate_caches()


def left_out(results: Path | None) -> list[str]:
    """What a step's results say was not measured, and why."""
    if results is None or not results.is_file():
        return []
    data = json.loads(results.read_text())
    found = []
    for entry in [*data.get("kernels", []), *data.get("skipped", [])]:
        if "reason" in entry:
            names = [f"{key} {value}" for key, value in entry.items() if key != "reason"]
            found.append(f"{', '.join(names)}: {entry['reason']}")
    return found


def pack(out: Path) -> None:
    """Results and logs, without data and weights, in one archive."""
    from mmsoft.fileio import write_whole

    files = [path for path in sorted(out.rglob("*")) if path.suffix in (".json", ".log")]
    with write_whole(out / "results.tar.gz") as partial, tarfile.open(partial, "w:gz") as archive:
        for path in files:
            name = path.relative_to(out)
            if name.parts[0] != "data":
                archive.add(path, name)


def run(step: Step, out: Path, left: float, **variables: str) -> dict[str, Any]:
    """Run a step into its log, within its limit and what is left of all, with such variables."""
    limit = max(min(step.limit, left - GRACE), 1)
    print(f"\n== {step.name} (at most {limit:.0f} s)\n   $ {shlex.join(step.command)}", flush=True)
    start, log = time.monotonic(), out / f"{step.name}.log"
    if step.results:
        step.results.unlink(missing_ok=True)  # of another run
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, PYTHONPATH=path, **variables)
    # Of tests, as they fail: pytest prints them at its end, which a stopped step may not reach.
    failures = out / f"{step.name}.failures.log"
    failures.unlink(missing_ok=True)
    environment["MMSOFT_FAILURES"] = str(failures)
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command,
            cwd=step.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What a shell starts in the background ignores it, and so would all steps.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = "complete" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(f"   {line}" for line in lines[-40:]))
    print(f"   {status} after {seconds:.0f} s; all of it in {log}", flush=True)
    found = dict(name=step.name, status=status, seconds=round(seconds, 1), last=lines[-1:])
    return found | dict(left_out=left_out(step.results))


def main() -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dry-run", action="store_true", help="on a CPU, with small sizes")
    p.add_argument("--wheels", type=Path, help="folder of wheels to install what is missing from")
    p.add_argument("--out", type=Path, default=ROOT / "work_dirs/gpu")
    p.add_argument("--steps", nargs="+", metavar="NAME", help="only these")
    args = p.parse_args()
    start = time.monotonic()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.wheels:
        install(args.wheels)
    every = steps(out, args.dry_run)  # which ask what is installed
    names = [step.name for step in every]
    if unknown := set(args.steps or []) - set(names):
        p.error(f"--steps has no {', '.join(sorted(unknown))}; choose from {' '.join(names)}")
    try:
        import torch

        from mmsoft.benchmark.measure import device_name, versions
        from mmsoft.fileio import write_whole
    except ImportError as error:
        p.error(f"{error}; see docs/cuda.md, or give --wheels")

    if not args.dry_run and not torch.cuda.is_available():
        p.error("torch sees no CUDA device; --dry-run runs the steps on a CPU, with small sizes")
    variables = dict(TORCH_COMPILE_DISABLE="1") if args.dry_run else {}  # minutes on a CPU
    data: dict[str, Any] = dict(
        device=device_name("cpu" if args.dry_run else "cuda"),
        dry_run=args.dry_run,
        versions=versions(),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        steps=[],
    )
    for step in every:
        if args.dry_run:  # which times nothing
            step.limit, left = DRY * step.limit, float("inf")
        else:
            left = SECONDS - (time.monotonic() - start)
            if step is every[-1]:
                step.limit = max(step.limit, int(left - GRACE))
        if args.steps is None or step.name in args.steps:
            if left > GRACE + 1:
                found = run(step, out, left, **variables)
            else:
                found = dict(name=step.name, status="no time was left", left_out=[])
            # On a CPU there are no kernels, but in Triton's interpreter.
            if found["left_out"] and found["status"] == "complete" and not args.dry_run:
                found["status"] = "complete but for what it left out"
            data["steps"].append(found)
            with write_whole(out / "gpu.json") as partial:
                partial.write_text(json.dumps(data, indent=1) + "\n")
    pack(out)
    incomplete = [step["name"] for step in data["steps"] if step["status"] != "complete"]
    print(
        f"\nresults in {out}" + (f"; not complete: {', '.join(incomplete)}" if incomplete else "")
    )
    sys.exit(bool(incomplete))


if __name__ == "__main__":
    main()
