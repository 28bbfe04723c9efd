"""`make gpu` on a CPU, with small sizes: no step fails for a typing error on the day."""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from loading import load_tool
from mmengine.config import Config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from required import need_triton

from mmsoft.benchmark import __main__ as benchmark
from mmsoft.benchmark import kernels, page, report
from mmsoft.ops import launch, reference

EVERY = ["preflight", "golden", "tests", "kernel-tests", "kernels", "data", "detector", "segmentor"]
EVERY += ["backbones", "triton", "amp", "compiled"]


SLOW = """
import time
print('begun', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('what it has found')
"""


# Distributions that it is told are not found.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
refused = set(sys.argv.pop(1).split(","))
names = {name for name, where in packages_distributions().items() if refused.issuperset(where)}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in names else super().find_spec(name, *args)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run(root, out, *arguments, python=sys.executable, **variables):
    command = [python, root / "tools/dev/gpu.py", "--out", out, *arguments]
    environment = dict(os.environ, **variables)
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, cwd=out
    )


@pytest.fixture
def warm_python(root, tmp_path_factory):
    """A Python with the modules that the steps import, which take most of their time."""
    program = tmp_path_factory.mktemp("warm") / "python"
    modules = ("torch", "pytest", "hypothesis", "matplotlib.pyplot", "mmsoft.benchmark.kernels")
    modules += ("mim.cli", "mmdet.apis", "mmseg.apis", "mmpretrain.models")
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, PYTHONPATH=path, TORCH_COMPILE_DISABLE="1", OMP_NUM_THREADS="1")
    environment["TRITON_INTERPRET"] = "0"
    server = subprocess.Popen(
        [sys.executable, root / "tests/helpers/warm_python.py", program, *modules],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with server:
        assert server.stdout.readline() == b"ready\n"
        yield program
        server.stdin.close()


@pytest.mark.parametrize("start", ["warm_python", pytest.param("", marks=pytest.mark.long)])
def test_dry_run(start, root, tmp_path, request):
    """All steps, by default as forks of one process, weekly as on the day, kernels included."""
    if not start:
        need_triton()
    python = request.getfixturevalue(start) if start else sys.executable
    variables = dict(TRITON_INTERPRET="0" if start else "1")
    done = run(root, tmp_path, "--dry-run", python=python, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in found["steps"]] == EVERY
    assert {step["status"] for step in found["steps"]} == {"complete"}
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    eager = [entry for entry in kernels if entry["way"] == "eager"]
    assert {(e["operation"], e["mode"]) for e in eager} == {
        (operation, mode)
        for operation in ("spread", "gather", "newton", "direct")
        for mode in ("forward", "backward")
    } | {("choice", "forward")}
    assert all(entry["right"] and entry["median_ms"] > 0 for entry in eager)
    by_kernels = [entry for entry in kernels if entry["way"] == "triton"]
    assert all("on cpu" in e["reason"] if start else e["right"] for e in by_kernels)
    files = [tmp_path / "kernels.json"]
    said = dict(zip(EVERY, (step["left_out"] for step in found["steps"])))
    assert len(by_kernels) == len(eager)
    assert sum("way triton: " in line for line in said["kernels"]) == (len(eager) if start else 0)
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = set(archive.getnames())
    assert names >= {"gpu.json", "kernels.json", "data.log"}
    assert not any("shapes" in name for name in names if name.startswith("data"))
    assert "test_kernels.py::" in (tmp_path / "kernel-tests.log").read_text()
    assert not said["backbones"]
    assert all("softpp-tiny-triton" in line for line in said["triton"])
    preflight = (tmp_path / "preflight.log").read_text()
    assert ("a Triton kernel: works" in preflight) == (not start)
    assert names >= {f"{name}/benchmark.json" for name in ("backbones", "triton")}
    runs = ("backbones", "compiled", "triton")
    files += [tmp_path / name / "benchmark.json" for name in runs]
    found = [report.read_json(path) for path in files[1:]]
    kinds = [(e["dtype"], e["mode"], e["batch"], e["compiled"]) for e in found[0]["results"]]
    grid = itertools.product(("forward", "train"), ("tf32", "bfloat16"))
    assert kinds == [(dtype, mode, 2, False) for mode, dtype in grid]
    names = {case["name"]: case["reason"] for case in found[2]["skipped"]}
    assert set(names) == ({"softpp-tiny-triton"} if start else set())
    assert all("the tensors are on cpu" in reason for reason in names.values())
    assert [(e["dtype"], e["compiled"]) for e in found[1]["results"]] == [("bfloat16", True)]
    page.write_docs([report.read_json(path) for path in files], tmp_path)
    assert "## Kernels, " in (tmp_path / "benchmarks.md").read_text()


def listed(root):
    """The distributions of a bare machine's torch, of the list of wheels, and those beside them."""
    lines = (root / "requirements/gpu/packages.txt").read_text().splitlines()
    every = {"mmcv", "mmsoft", "pip", "torch", "torchvision"}
    every |= {"opencv-python", "triton"}  # the same cv2; of torch with CUDA
    every |= {line.partition("==")[0] for line in lines if not line.startswith("#")}
    left = ["torch", "torchvision"]
    while left:
        for requirement in map(Requirement, metadata.requires(left.pop()) or []):
            if requirement.marker is None or requirement.marker.evaluate(dict(extra="")):
                left += {requirement.name} - every
                every.add(requirement.name)
    return set(map(canonicalize_name, every))


def test_the_listed_wheels_are_enough(root, run_outside):
    """What is missing, one of them here, is said by the first step, which tries the others too.

    A kernel among them, in Triton's interpreter.
    """
    need_triton()
    there = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    refused = {name for name in there if canonicalize_name(name) not in listed(root)}
    program = root / "tools/dev/preflight.py"
    arguments = "-c", WITHOUT, ",".join(refused | {"pytest-xdist"}), program, "--device", "cpu"
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = run_outside(*arguments, PYTHONPATH=path, TRITON_INTERPRET="1")
    versions, *lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}, " in versions
    assert "other than tested" not in done.stdout  # here they are the tests' own
    failures = [line for line in lines if ": works (" not in line]
    assert "a Triton kernel: works" in done.stdout
    assert done.returncode == 1
    assert failures == [
        "import xdist: ModuleNotFoundError: No module named 'xdist'",
        "1 of 14 do not work",
    ]


def test_other_versions_than_the_tests_own_are_named(tmp_path):
    constraints = tmp_path / "constraints.txt"
    plain = torch.__version__.partition("+")[0]  # "+cpu" is a build of it
    constraints.write_text(f"# a comment\nnumpy==1.0\ntorch=={plain}\nmissing==1\n")
    found = load_tool("dev/preflight.py").others(constraints)
    assert found == [f"numpy {metadata.version('numpy')} (1.0)"]


def test_what_is_missing_is_installed_and_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    """One wheel is of what is there, one of another Python."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version, tag in (
        *(("mmsoft_first", "1.0", "py3-none-any"), ("mmsoft_other", "1.0", "cp27-none-any")),
        *(("torch", "9.9", "py3-none-any"), ("setuptools", "9.9", "py3-none-any")),
    ):
        folder = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-{version}-{tag}.whl", "w") as archive:
            archive.writestr(f"{name}.py", "")
            archive.writestr(
                f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{folder}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
            )
            archive.writestr(f"{folder}/RECORD", "")
    gpu = load_tool("dev/gpu.py")
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "nothing")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "there"))
    gpu.install(wheels)
    installed = {path.name for path in (tmp_path / "there").glob("*.py")}
    assert installed == {"mmsoft_first.py", "setuptools.py"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ERROR: ")[0] for line in lines] == [
        "pip install setuptools==9.9",  # all at once
        "pip install mmsoft_other==1.0",
        f"pip install {gpu.ROOT}",
    ]


def test_the_commands_of_the_day(tmp_path, monkeypatch, capsys):
    """Not those of the dry run: what they ask for exists, and ends with the limits."""
    gpu = load_tool("dev/gpu.py")
    steps = {step.name: step for step in gpu.steps(tmp_path, dry=False)}
    assert list(steps) == EVERY
    assert sum(step.limit for step in steps.values()) <= gpu.SECONDS - gpu.START
    for name, compiled in (("backbones", False), ("triton", False), ("compiled", True)):
        _, _, module, *arguments = steps[name].command
        assert module == "mmsoft.benchmark"
        args = benchmark.parser().parse_args(arguments)
        groups = benchmark.plan(args)
        assert {section for section, _ in groups} == {"results"}  # the preset's others take long
        found = [case for _, group in groups for case in group]
        assert {case.name for case in found} <= set(benchmark.BACKBONES)
        assert {(case.device, case.compiled) for case in found} == {("cuda", compiled)}
        kinds = [(g[0].size, g[0].batch, g[0].mode, g[0].dtype) for _, g in groups]
        modes, dtypes, models = ("forward", "train"), ["float32", "tf32", "bfloat16"], gpu.MODELS
        sizes = [((800, 1344), 2), ((512, 512), 16), ((224, 224), 128)]
        if name == "compiled":
            dtypes, models, sizes = ["bfloat16"], ["softpp-tiny", "pvtv2-b1"], sizes[:1]
        elif name == "triton":  # with the others, whose groups these replace on the page
            dtypes, models, sizes = ["bfloat16", "float32"], [*models, *gpu.WITH_KERNELS], sizes[:1]
        for mode, without in (("forward", set()), ("train", {"released-tiny"})):
            names = [{c.name for c in g} for _, g in groups if g[0].mode == mode]
            assert all(each == set(models) - without for each in names)
        grid = itertools.product(sizes, modes, dtypes)
        assert kinds == [(*size, mode, dtype) for size, mode, dtype in grid]
    arguments = steps["kernels"].command[3:]
    args = kernels.parser().parse_args(arguments)
    planned = list(kernels.ordered(kernels.plan(args.tokens, args.landmarks), args.ways))
    assert {(case.tokens, case.landmarks) for case, _ in planned if case.operation == "gather"} == {
        (tokens, landmarks) for tokens in (3136, 16384, 67200) for landmarks in (49, 64, 128)
    }
    ways = [way for _, way in planned]
    assert list(dict.fromkeys(ways)) == ["eager", "triton", "compiled"]
    assert ways == sorted(ways, key=["eager", "triton", "compiled"].index)  # one after another
    assert ways.count("eager") == ways.count("triton") == 54
    compiled = {
        (case.operation, case.tokens, case.landmarks) for case, way in planned if way == "compiled"
    }
    sizes = dict(spread=67200, gather=67200, newton=0, direct=0, choice=1050)
    assert compiled == {(operation, tokens, 49) for operation, tokens in sizes.items()}
    monkeypatch.setattr("sys.argv", ["kernels", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or it would run
    with pytest.raises(SystemExit):
        kernels.main()
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not set(gpu.OF_KERNELS) & set(steps["tests"].command)
    assert {f"--ignore={path}" for path in gpu.OF_KERNELS} <= set(steps["tests"].command)
    for name in ("golden", "tests", "kernel-tests", "amp"):
        paths = [word for word in steps[name].command if word.startswith("tests/")]
        assert paths
        assert all((gpu.ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("name", ["detector", "segmentor"])
def test_the_trainings_of_the_day(name, tmp_path, monkeypatch):
    """MIM and the libraries' programs take the options, and the config has what is set in it."""
    train = pytest.importorskip("mim.commands.train").cli
    step = {step.name: step for step in load_tool("dev/gpu.py").steps(tmp_path, dry=False)}[name]
    assert step.command[1:4] == ["-m", "mim", "train"]
    given = train.make_context("train", step.command[4:]).params
    assert given["gpus"] == 1
    package = pytest.importorskip(given["package"])
    program = Path(package.__file__).parent / ".mim/tools/train.py"
    module = runpy.run_path(str(program))
    monkeypatch.setattr("sys.argv", ["train.py", given["config"], *given["other_args"]])
    monkeypatch.setenv("LOCAL_RANK", "0")
    args = module["parse_args"]()
    assert args.amp
    config = Config.fromfile(args.config)
    for key in args.cfg_options:
        *parents, last = key.split(".")
        parent = functools.reduce(lambda found, word: found[word], parents, config)
        assert last in (*parent, "persistent_workers", "indices")  # which configs need not have
    config.merge_from_dict(args.cfg_options)


class FakeCuda:
    """What times_of asks of torch.cuda, with the arguments that it takes; a call takes 2 ms."""

    def __init__(self, records):
        self.records, self.now, self.recording = records, 0.0, None
        real = torch.cuda.graph

        fake = self

        class CUDAGraph:
            calls = 0

            def replay(self):
                fake.now += 2.0 * self.calls

        @contextlib.contextmanager
        def graph(*args, **kwargs):
            fake.recording = inspect.signature(real).bind(*args, **kwargs).arguments["cuda_graph"]
            try:
                yield
                if not fake.records:
                    raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                fake.recording = None

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        for made in (CUDAGraph, graph, Event):
            assert hasattr(torch.cuda, made.__name__)
            setattr(self, made.__name__, made)

    def step(self):
        if self.recording is None:
            self.now += 2.0
        else:
            self.recording.calls += 1

    def synchronize(self):
        pass

    def current_stream(self):
        return None


@pytest.mark.parametrize("by", ["graph", "events"])
def test_kernels_are_timed_on_a_gpu_by_its_own_clock(by, monkeypatch):
    """Of a graph of many calls, or of calls in a row; and the host apart."""
    fake = FakeCuda(records=by == "graph")
    monkeypatch.setattr(torch, "cuda", fake)
    found = kernels.times_of(fake.step, "cuda", 3)
    assert found["timed_by"] == by
    assert found["median_ms"] == pytest.approx(2.0)
    assert 0 < found["host_ms"] < 1


def test_kernels_are_timed_on_a_cpu_by_the_clock():
    found = kernels.times_of(lambda: time.sleep(0.004), "cpu", 3)
    assert found["timed_by"] == "clock"
    assert found["median_ms"] >= 4
    assert found["host_ms"] >= 4


def test_make_takes_the_first_python_whose_torch_sees_a_gpu(root, tmp_path):
    for name, status in (("python3.11", 1), ("python3", 0), ("python", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\n[ "$1" = -c ] && exit {status}\necho {name} "$@"\n')
        path.chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:/usr/bin:/bin")

    def make(*arguments):
        command = ["make", "-f", root / "Makefile", "gpu", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    out = make("OUT=o", "WHEELS=w").strip()
    assert out == "python3 tools/dev/gpu.py --wheels w --out o"
    assert make("WHEELS=w").strip() == "python3 tools/dev/gpu.py --wheels w"
    assert "no Python found whose torch sees a GPU" in make("PYTHON=python3.11")
    assert make("PYTHON=python").strip() == "python tools/dev/gpu.py"


def test_a_step_that_fails_or_is_slow_does_not_stop_the_next(tmp_path, monkeypatch):
    """One that is stopped, at its limit, can still say what it has found, in the background too."""
    gpu = load_tool("dev/gpu.py")
    programs = dict(
        fails=("raise SystemExit('broken')", 60),
        slow=(SLOW, 3),
        deaf=(f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLOW}", 3),
        whole=("import time; time.sleep(2.5); print('done')", 4),
        works=("import os; print(os.environ['PYTHONPATH'])", 60),
    )
    monkeypatch.setattr(
        gpu,
        "steps",
        lambda out, dry: [
            gpu.Step(name, [sys.executable, "-c", code], limit, out)
            for name, (code, limit) in programs.items()
        ],
    )
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry-run", "--out", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", "more")
    monkeypatch.setattr(gpu, "DRY", 1)
    monkeypatch.setattr(gpu, "GRACE", 3.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in `&`
    variables = dict(os.environ)
    try:
        with pytest.raises(SystemExit) as caught:
            gpu.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert dict(os.environ) == variables
    assert caught.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [(step["name"], step["status"], step["last"]) for step in found] == [
        ("fails", "failed", ["broken"]),
        ("slow", "stopped at its limit", ["what it has found"]),
        ("deaf", "stopped at its limit", ["begun"]),
        ("whole", "complete", ["done"]),
        ("works", "complete", [f"{gpu.ROOT}{os.pathsep}more"]),
    ]


def test_failures_of_a_test_step_that_is_stopped_are_kept(root, tmp_path, monkeypatch):
    """At once, whatever pytest prints at its end; and those of an earlier run are not."""
    gpu = load_tool("dev/gpu.py")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of this test itself
    (tmp_path / "conftest.py").write_text((root / "tests/conftest.py").read_text())
    (tmp_path / "tests").mkdir()
    program = "import time\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    time.sleep(60)\n"
    (tmp_path / "tests/test_it.py").write_text(program)
    (tmp_path / "slow.failures.log").write_text("old")
    workers = ["-n", "1"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *workers]
    step = gpu.Step("slow", [*command, f"--rootdir={tmp_path}", "tests"], 25, tmp_path)
    assert gpu.run(step, tmp_path, 40)["status"] == "stopped at its limit"
    kept = (tmp_path / "slow.failures.log").read_text()
    assert "test_it.py::test_a (call)" in kept
    assert "assert 1 == 2" in kept
    assert "old" not in kept


def test_the_data_of_the_day_are_made_in_time(tmp_path):
    gpu = load_tool("dev/gpu.py")
    (step,) = (step for step in gpu.steps(tmp_path, dry=False) if step.name == "data")
    assert gpu.run(step, tmp_path, step.limit)["status"] == "complete"
    assert len(list((tmp_path / "data/shapes/coco/train2017").iterdir())) == 80


def incomplete_run(gpu, out, monkeypatch):
    """The steps of a run on what seems to be a GPU, not all of them complete."""
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 1
    return json.loads((out / "gpu.json").read_text())["steps"]


def test_what_is_left_out_makes_a_step_incomplete_on_a_gpu(tmp_path, monkeypatch):
    """And what an earlier run found is not this one's."""
    gpu = load_tool("dev/gpu.py")
    kernels = dict(kernels=[dict(way="triton", reason="no Triton"), dict(way="eager", right=True)])
    (tmp_path / "late.json").write_text(json.dumps(kernels))
    code = f"open('kernels.json', 'w').write({json.dumps(kernels)!r})"
    monkeypatch.setattr(
        gpu,
        "steps",
        lambda out, dry: [
            gpu.Step("kernels", [sys.executable, "-c", code], 9, out, out / "kernels.json"),
            gpu.Step("late", [sys.executable, "-c", ""], 9, out, out / "late.json"),
        ],
    )
    found = incomplete_run(gpu, tmp_path, monkeypatch)
    assert [(step["status"], step["left_out"]) for step in found] == [
        ("complete but for what it left out", ["way triton: no Triton"]),
        ("complete", []),
    ]


def test_a_step_that_no_time_is_left_for_does_not_begin(tmp_path, monkeypatch):
    gpu = load_tool("dev/gpu.py")
    monkeypatch.setattr(gpu, "steps", lambda out, dry: [gpu.Step("late", ["no-such-program"], 9)])
    monkeypatch.setattr(gpu, "SECONDS", gpu.GRACE)
    (found,) = incomplete_run(gpu, tmp_path, monkeypatch)
    assert found["status"] == "no time was left"


@pytest.mark.parametrize(
    ("operation", "mode", "tokens", "landmarks", "products"),
    [
        ("spread", "forward", 2, 2, 2),
        ("gather", "forward", 2, 2, 2),
        ("spread", "backward", 3, 4, 5),  # grad, x and its gradient; y, w and theirs
        ("gather", "backward", 4, 3, 5),
    ],
)
def test_roofline(operation, mode, tokens, landmarks, products):
    """In batches of two with two heads of 32 channels."""
    case = kernels.KernelCase(operation, 1000, 49, mode)
    memory = dict(copy_gb_s=1e-6, float32_tflops=1e9)  # a kB and any number of products a second
    arrays = 4 * 32 * (tokens * 1000 + landmarks * 49)
    assert kernels.roofline_ms(case, memory) == pytest.approx(4 * arrays)
    compute = dict(copy_gb_s=1e9, float32_tflops=1e9, tf32_tflops=1e-6)
    seconds = 3 * products * 4 * 2 * 1000 * 49 * 32 / 1e6
    assert kernels.roofline_ms(case, compute) == pytest.approx(1e3 * seconds)


def test_a_worse_choice_has_less_volume():
    case = kernels.KernelCase("choice", 60, 5, "forward")
    (candidates,) = kernels.arguments(case, "cpu")
    ours, exact = (function(candidates.detach()) for function in kernels.functions(case))
    most = kernels.volume(candidates, *exact)
    assert most.shape == (2, 2)
    torch.testing.assert_close(kernels.volume(candidates, *ours), most)
    first = torch.arange(5).expand(2, 2, -1)
    assert (kernels.volume(candidates, first, exact[1]) < most - 0.01 * most.abs()).all()
    chosen = candidates.detach()[0, 0, exact[0][0, 0, :3]].double()
    three = torch.logdet(reference.gaussian_kernel(chosen, chosen))
    fewer = exact[1] & (torch.arange(5) < 3)
    assert kernels.volume(candidates, exact[0], fewer)[0, 0] == pytest.approx(float(three))


def test_what_is_wrong_is_called_so():
    case = dict(mode="backward")
    errors = dict(eager=1e-5, triton=2.9e-5, compiled=3.1e-5, broken=float("nan"))
    entries = [dict(case, way=way, error=error) for way, error in errors.items()]
    kernels.judge(entries, None)
    assert [entry["right"] for entry in entries] == [True, True, False, False]
    assert report.kernel_table(entries).count("(WRONG)") == 2


def test_what_did_not_run_is_a_failure_where_there_are_kernels():
    ran, not_run = dict(way="triton", right=True), dict(way="triton", reason="no Triton")
    assert not kernels.failed([ran, dict(way="eager", right=True)], "cuda")
    assert kernels.failed([ran, not_run], "cuda")
    assert kernels.failed([dict(way="eager", right=False)], "cuda")
    assert not kernels.failed([ran, dict(way="compiled", reason="no compiler")], "cuda")
    assert not kernels.failed([not_run], "cpu")


def test_the_truth_is_computed_once_and_its_failure_has_a_reason(monkeypatch):
    case, computed = kernels.KernelCase("spread", 7, 3, "forward"), []
    definition = kernels._definition

    def noted(*tensors):
        computed.append(len(tensors))
        return definition(*tensors)

    monkeypatch.setattr(kernels, "_definition", noted)
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})  # as without Triton's interpreter
    kernels.truths.cache_clear()
    for way in ("eager", "triton"):
        found = kernels.measured(case, way, "cpu", 1)
        assert ("error" in found) == (way == "eager")
    assert computed == [3]

    def fails(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "arguments", fails)
    assert "illegal memory access" in kernels.measured(case, "eager", "cpu", 1)["reason"]


def test_the_docs_take_the_kernels_in(tmp_path):
    """What is wrong, did not run, or is of another way, meets no target."""
    times = [
        dict(operation="newton", landmarks=64, mode="forward", way="triton", median_ms=0.1),
        dict(operation="newton", landmarks=64, mode="forward", way="eager", median_ms=0.01),
        dict(operation="newton", landmarks=64, mode="backward", way="triton", median_ms=0.02),
        dict(operation="spread", landmarks=49, mode="forward", way="triton", median_ms=1.0)
        | dict(roofline=0.7),
        dict(operation="gather", landmarks=49, mode="forward", way="triton", median_ms=1.0)
        | dict(roofline=0.65),
    ]
    times = [entry | dict(tokens=9, error=1e-7, right=True) for entry in times]
    wrong = times[-1] | dict(tokens=10, roofline=0.1, right=False)
    others = [times[-1] | dict(tokens=10, mode="backward"), wrong]
    missing = {key: wrong[key] for key in ("operation", "landmarks", "mode")}
    others += [times[-1] | dict(tokens=11, mode="backward")]
    others += [missing | dict(tokens=11, way=way) for way in ("eager", "triton")]
    data = dict(
        device="a GPU",
        versions=dict(torch="2.13.0"),
        date="2026-11-28T00:00:00",
        commit="c0ffee",
        repeats=11,
        ceilings=dict(copy_gb_s=2000.0, tf32_tflops=300.0),
        kernels=[*times, *others],
    )
    page.write_docs([data], tmp_path)
    text = " ".join((tmp_path / "benchmarks.md").read_text().split())
    assert "## Kernels, a GPU 2026-11-28; torch 2.13.0. Commit c0ffee." in text
    share = "tokens, all right: least share of the roofline |"
    assert f"products of 9 {share} 0.650 | - | ≥ 0.6 | yes |" in text
    for tokens in (10, 11):
        assert f"products of {tokens} {share} - | - | ≥ 0.6 | not measured |" in text
    whose = "(ms); wanted is what LaplacianFormer's authors publish of theirs, on an A100, of "
    whose += "unknown batch |"
    newton = f"Newton of {kernels.MATRICES} matrices of 64 landmarks,"
    assert f"{newton} forward {whose} 0.100 | - | ≤ 0.14 | yes |" in text
    assert f"{newton} backward {whose} 0.0200 | - | ≤ 0.01 | **no** |" in text
    assert text.count("triton (WRONG)") == 1


def test_what_it_asks_for(run_tool, tmp_path):
    if not torch.cuda.is_available():
        status, _, error = run_tool("dev/gpu.py", "--out", tmp_path)
        assert status == 2
        assert "torch sees no CUDA device; --dry-run" in error
    status, _, error = run_tool("dev/gpu.py", "--out", tmp_path, "--steps", "cernels")
    assert status == 2
    assert "--steps has no cernels; choose from preflight golden tests" in error
