"""The Triton kernels compiled without a GPU: registers, spills and shared memory."""

import json
import os
import subprocess
import sys

import pytest
from compiled_kernels import CASES

from mmsoft.ops import launch

# What every GPU from compute capability 8.0 on has for a block of threads.
SHARED_MEMORY = 99 * 1024
# Spills are bounded for this version: another assigns registers differently. Of 3.6.0 they come to
# 228 bytes of a thread, in the solve for 10.0.
TRITON = "3.9.0"
# Bytes of a thread, by kernel and compute capability.
SPILLED = {("walk_kernel", 80): 20, ("newton_kernel", 80): 32, ("newton_tiles_kernel", 80): 4}
SPILLED |= {("solve_kernel", 100): 8}
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
    ("arch", "cases"),
    [
        (90, SOON),
        *(pytest.param(arch, tuple(CASES), marks=pytest.mark.long) for arch in (80, 90, 100)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} cases",
)
def test_nothing_spills_and_shared_memory_suffices(arch, cases, root, tmp_path):
    if reason := launch.lacking():
        pytest.skip(reason)
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
        spilled = SPILLED.get((kernel["kernel"], arch), 0)
        assert kernel["spilled"] <= spilled or kernel["triton"] != TRITON, kernel
        # What has no reason to fill the registers leaves room for a second program.
        assert kernel["registers"] <= REGISTERS.get(kernel["kernel"], 255), kernel
    assert max(kernel["shared"] for kernel in found) <= SHARED_MEMORY
