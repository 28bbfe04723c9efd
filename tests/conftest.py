"""What all tests share."""

import gc
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

# Before torch is imported, and inherited by the processes that tests start: the tensors of the
# tests are small, and many threads only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
# A process forked from one in which OpenCV has threads waits forever once it changes their number.
os.environ["OPENCV_FOR_THREADS_NUM"] = "1"
# cuBLAS is asked once in a process whether it is set: deterministic mode refuses products without.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "pretended"),
        help="where the tests that take a device run (default: cpu); pretended: a GPU without one",
    )


def pytest_configure(config):
    # Read when Triton is imported: its kernels then run on tensors of a CPU.
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_logreport(report):
    """Write a failure to the file MMSOFT_FAILURES at once, of all workers in the first process."""
    path = os.environ.get("MMSOFT_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


def pytest_collection_finish():
    """What has been imported stays, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or what is not freed at the end counts as lost for some extensions


@pytest.fixture(scope="session")
def device(request):
    """The device of --device."""
    return "cpu" if request.config.getoption("device") == "cpu" else "cuda"


@pytest.fixture(scope="session", autouse=True)
def bases_looked_up_once():
    """Where a collected test reads configs, and MMEngine is imported."""
    if "mmengine.config" in sys.modules:
        from loading import look_up_once

        look_up_once()


@pytest.fixture(autouse=True)
def independence_of_other_tests():
    """Give every test the same random numbers, MMEngine's default scope and its loggers.

    A logger made in a test writes to that test's captured output, which is closed after it. A
    level set in a test would hide from later ones what they expect to be logged.
    """
    import numpy
    import torch

    module = sys.modules.get("mmengine.logging")
    before = dict(module.MMLogger._instance_dict) if module else {}
    levels = {name: logger.level for name, logger in before.items()}

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (OpenMMLab's transforms draw from it)
    torch.manual_seed(0)
    yield
    if registry := sys.modules.get("mmengine.registry"):
        registry.init_default_scope("mmengine")
    if module := sys.modules.get("mmengine.logging"):
        loggers = module.MMLogger._instance_dict
        for name in loggers.keys() - before.keys():
            del loggers[name]
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


@pytest.fixture(autouse=True)
def tensors_on_device(request):
    """Operators, models and faults are tested on --device, but for what only a CPU does."""
    device = request.config.getoption("device")
    folder = request.path.relative_to(ROOT).parts[1]
    if device == "cpu" or folder not in ("ops", "models", "faults"):
        yield
        return
    node = request.node
    if marker := node.get_closest_marker("cpu"):
        pytest.skip(f"of CPUs alone: {marker.kwargs.get('reason', 'what it asks')}")
    if (by_runner := node.get_closest_marker("runner")) and device == "pretended":
        pytest.skip("MMEngine's Runner would start the GPU")
    import torch
    from on_device import OnDevice
    from pretended import pretended

    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    there = pretended() if device == "pretended" else nullcontext()
    with there, nullcontext() if by_runner else OnDevice("cuda"):
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="session")
def root():
    """The root of the repository."""
    return ROOT


@pytest.fixture
def run_outside(tmp_path):
    """Run this Python from a folder outside the repository; returns the finished process.

    The interpreter (`python`) and changes to the environment can be given.
    """

    def run(*arguments, python=sys.executable, **environment):
        return subprocess.run(
            [str(python), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a script of tools/ in this process; returns exit status, output and errors."""
    from loading import load_tool

    def run(path, *arguments):
        monkeypatch.setattr("sys.argv", [Path(path).name, *map(str, arguments)])
        capsys.readouterr()
        try:
            status = load_tool(path).main()
        except SystemExit as caught:
            status = caught.code
        return status or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with data/shapes in it, not to be written to."""
    from true_layout import make_demo_data

    folder = tmp_path_factory.mktemp("shapes")
    make_demo_data(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory):
    """The wheel, built from the source distribution so that both are tried."""
    folder = tmp_path_factory.mktemp("wheel")

    def build(kind, source):
        program = f"import sys; from setuptools.build_meta import {kind}; {kind}(sys.argv[1])"
        command = [sys.executable, "-c", program, str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)

    build("build_sdist", root)
    (sdist,) = folder.glob("mmsoft-*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    build("build_wheel", folder / sdist.name.removesuffix(".tar.gz"))
    return next(folder.glob("mmsoft-*.whl"))


@pytest.fixture(scope="session")
def fresh_python(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel installed, not to be changed.

    It sees the packages of this environment, after its own.
    """
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    # With a checkout on PYTHONPATH pip would take the package for installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "--python", python, *install]
    subprocess.run(command, env=environment, check=True)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    ours = str(Path(pytest.__file__).parents[1])
    (site_packages / "outer.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return python
