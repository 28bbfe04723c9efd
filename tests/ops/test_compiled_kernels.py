"""The Triton kernels compiled without a GPU: registers, spills and shared memory."""

import json
import os
import subprocess
import sys

import pytest
from compiled_kernels import CASES
from required import need_triton

from mmsoft.ops import launch

# What every GPU from compute capability 8.0 on has for a block of threads.
SHARED_MEMORY = 99 * 1024
# Bytes of a thread, by version of Triton, kernel and compute capability. Each version assigns
# registers differently; others than that of the tests and an older one are not bounded.
SPILLED = {
    "3.9.0": {("newton_kernel", 80): 32, ("solve_kernel", 100): 4},
    "3.6.0": {
        **{("walk_kernel", 80): 12, ("newton_kernel", 80): 32, ("newton_tiles_kernel", 80): 8},
        **{("walk_kernel", 100): 16, ("solve_kernel", 100): 228},
    },
}
REGISTERS = dict(centre_kernel=112, choice_kernel=80, newton_tiles_kernel=192)
REGISTERS |= dict(newton_backward_kernel=168, solve_backward_kernel=224)
# The usual number of landmarks, and what needs the most.
SOON = (
    "spread-49",
    "gather-backward-wide",
    "guarded-49",
    "newton_backward-49",
    "solve-49",
    "choice-49",
)

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("variables", "outcome"),
    [
        ({}, pytest.skip.Exception),
        (dict(MMSOFT_TRITON="required"), pytest.skip.Exception),
        (dict(CI="true", MMSOFT_TRITON="required"), pytest.fail.Exception),
    ],
)
def test_triton_that_must_be_there_is_missed(request, monkeypatch, variables, outcome):
    monkeypatch.setattr(launch, "lacking", lambda: "Triton is not installed")
    for name in ("CI", "MMSOFT_TRITON"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for run in (need_triton, lambda: request.getfixturevalue("kernels")):
        with pytest.raises(outcome, match="Triton is not installed"):
            run()


@pytest.mark.parametrize(
    ("arch", "cases"),
    [
        *((arch, SOON) for arch in (80, 90, 100)),
        *(pytest.param(arch, tuple(CASES), marks=pytest.mark.long) for arch in (80, 90, 100)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} cases",
)
def test_nothing_spills_and_shared_memory_suffices(arch, cases, root, tmp_path):
    need_triton()
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    program = root / "tests/helpers/compiled_kernels.py"
    command = [sys.executable, "-W", "ignore", program, arch, *cases]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["case"] for kernel in found} == set(cases)
    launched = [kernel["case"] for kernel in found if "spread" not in kernel["case"]]
    launched = [case for case in launched if "gather" not in case]
    assert len(launched) == len(set(launched))  # the products alone take more than one launch
    assert all(kernel["arch"] == arch for kernel in found)
    for kernel in found:
        assert kernel["rounded"] == kernel["products"], kernel
        if (spilled := SPILLED.get(kernel["triton"])) is not None:
            assert kernel["spilled"] <= spilled.get((kernel["kernel"], arch), 0), kernel
        # What has no reason to fill the registers leaves room for a second program.
        assert kernel["registers"] <= REGISTERS.get(kernel["kernel"], 255), kernel
    assert max(kernel["shared"] for kernel in found) <= SHARED_MEMORY
