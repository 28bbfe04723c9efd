"""`make gpu` on a CPU, with small sizes: no step fails for a typing error on the day."""

import json
import subprocess
import sys

import pytest
import torch
from loading import load_tool

from mmsoft.benchmark import __main__ as benchmark
from mmsoft.benchmark import kernels, page, report
from mmsoft.ops import reference

EVERY = ["tests", "kernels", "large", "data", "detector", "segmentor", "amp", "backbones"]


SLOW = """
import time
print('begun', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('what it has found')
"""


def run(root, out, *arguments):
    command = [sys.executable, root / "tools/dev/gpu.py", "--out", out, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=out)


@pytest.mark.parametrize(
    "steps", [["kernels", "data"], pytest.param(EVERY, marks=pytest.mark.long)]
)
def test_dry_run(steps, root, tmp_path):
    done = run(root, tmp_path, "--dry-run", "--steps", *steps)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in found["steps"]] == steps
    assert {step["status"] for step in found["steps"]} == {"complete"}
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    eager = [entry for entry in kernels if entry["way"] == "eager"]
    assert {(e["operation"], e["mode"]) for e in eager} == {
        (operation, mode)
        for operation in ("spread", "gather", "newton", "direct")
        for mode in ("forward", "backward")
    } | {("choice", "forward")}
    assert all(entry["right"] and entry["median_ms"] > 0 for entry in eager)
    assert all("on cpu" in e["reason"] for e in kernels if e["way"] == "triton")
    if "backbones" in steps:
        measured = json.loads((tmp_path / "large/benchmark.json").read_text())["results"]
        assert {entry["dtype"] for entry in measured} == {"float32", "tf32"}


def test_the_commands_of_the_day(tmp_path, monkeypatch, capsys):
    """Not those of the dry run: what they ask for exists, and ends with the limits."""
    gpu = load_tool("dev/gpu.py")
    steps = {step.name: step for step in gpu.steps(tmp_path, dry=False)}
    assert list(steps) == EVERY
    assert sum(step.limit for step in steps.values()) <= gpu.SECONDS
    for name in ("large", "backbones"):
        _, _, module, *arguments = steps[name].command
        assert module == "mmsoft.benchmark"
        args = benchmark.parser().parse_args(arguments)
        assert set(args.models) <= set(benchmark.BACKBONES)
    arguments = steps["kernels"].command[3:]
    monkeypatch.setattr("sys.argv", ["kernels", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or it would run
    with pytest.raises(SystemExit):
        kernels.main()
    assert "torch sees no CUDA device" in capsys.readouterr().err
    for name in ("tests", "amp"):
        paths = [word for word in steps[name].command if word.startswith("tests/")]
        assert paths
        assert all((gpu.ROOT / path).exists() for path in paths)


def test_a_step_that_fails_or_is_slow_does_not_stop_the_next(tmp_path, monkeypatch):
    """One that is stopped can still say what it has found."""
    gpu = load_tool("dev/gpu.py")
    programs = dict(
        fails=("raise SystemExit('broken')", 60),
        slow=(SLOW, 6),
        deaf=(f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLOW}", 6),
        works=("print('done')", 60),
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
    monkeypatch.setattr(gpu, "DRY", 1)
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [(step["name"], step["status"], step["last"]) for step in found] == [
        ("fails", "failed", ["broken"]),
        ("slow", "stopped at its limit", ["what it has found"]),
        ("deaf", "stopped at its limit", ["begun"]),
        ("works", "complete", ["done"]),
    ]


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


def test_the_docs_take_the_kernels_in(tmp_path):
    """What is wrong, or of another way, meets no target."""
    times = [
        dict(operation="newton", landmarks=64, mode="forward", way="triton", median_ms=0.1),
        dict(operation="newton", landmarks=64, mode="forward", way="eager", median_ms=0.01),
        dict(operation="newton", landmarks=64, mode="backward", way="triton", median_ms=0.02),
        dict(operation="spread", landmarks=49, mode="forward", way="triton", median_ms=1.0)
        | dict(roofline=0.7),
        dict(operation="gather", landmarks=49, mode="forward", way="triton", median_ms=1.0)
        | dict(roofline=0.65),
    ]
    times = [entry | dict(tokens=0, error=1e-7, right=True) for entry in times]
    wrong = times[-1] | dict(roofline=0.1, right=False)
    data = dict(
        device="a GPU",
        versions=dict(torch="2.13.0"),
        date="2026-11-28T00:00:00",
        commit="c0ffee",
        repeats=11,
        ceilings=dict(copy_gb_s=2000.0, tf32_tflops=300.0),
        kernels=[*times, wrong],
    )
    page.write_docs([data], tmp_path)
    text = " ".join((tmp_path / "benchmarks.md").read_text().split())
    assert "## Kernels, a GPU 2026-11-28; torch 2.13.0. Commit c0ffee." in text
    assert "| least share of the roofline | 0.650 | - | ≥ 0.6 | yes |" in text.replace(
        "streamed products: ", ""
    )
    assert "64 landmarks, forward (ms) | 0.100 | - | ≤ 0.14 | yes |" in text
    assert "64 landmarks, backward (ms) | 0.0200 | - | ≤ 0.01 | **no** |" in text
    assert text.count("triton (WRONG)") == 1


def test_what_it_asks_for(run_tool, tmp_path):
    if not torch.cuda.is_available():
        status, _, error = run_tool("dev/gpu.py", "--out", tmp_path)
        assert status == 2
        assert "torch sees no CUDA device; --dry-run" in error
    status, _, error = run_tool("dev/gpu.py", "--out", tmp_path, "--steps", "cernels")
    assert status == 2
    assert "--steps has no cernels; choose from tests kernels" in error
