"""The Triton kernels compiled without a GPU: registers, spills and shared memory."""

import json
import os
import subprocess
import sys

import pytest
from compiled_kernels import CASES
from required import need_triton

from mmsoft.ops import launch

ARCHS = (80, 90, 100)
# What every GPU from compute capability 8.0 on has for a block of threads.
SHARED_MEMORY = 99 * 1024
# Bytes of a thread at most, for 8.0, 9.0 and 10.0, by version of Triton: each assigns registers
# differently. Other versions may spill SLACK more than the newest here. Odd: nothing is aligned.
SLACK = 64
SPILLED = {
    "3.9.0": dict(
        walk_kernel=(0, 0, 16),
        walk_kernel_odd=(112, 16, 8),
        newton_kernel=(32, 0, 12),
        newton_tiles_kernel=(16, 0, 0),
        solve_kernel=(0, 12, 44),
        solve_backward_kernel=(0, 12, 20),
        choice_kernel=(0, 0, 4),
        choice_kernel_odd=(0, 0, 4),
    ),
    "3.7.1": dict(  # which torch 2.13 brings
        walk_kernel=(0, 4, 4),
        walk_kernel_odd=(108, 12, 20),
        newton_kernel=(32, 0, 0),
        newton_tiles_kernel=(32, 0, 0),
        solve_kernel=(0, 0, 64),
        choice_kernel=(4, 4, 0),
    ),
    "3.6.0": dict(
        walk_kernel=(0, 0, 16),
        walk_kernel_odd=(120, 0, 8),
        newton_kernel=(32, 0, 0),
        newton_tiles_kernel=(16, 0, 0),
        solve_kernel=(0, 0, 152),
    ),
}
NEWEST = next(iter(SPILLED))
# By default: each kernel, and what it is compiled for, for some capability. Of the newest version,
# how many warps a multiprocessor holds, by registers, shared and tensor memory; LEAST of all
# others. 255 registers leave room for 8, where spills and shared memory show what gets worse.
LEAST = 8
SOON = {
    "80:spread-backward-odd": 8,
    "80:spread-49": 8,
    "80:spread-backward-49": 8,
    "90:gather-odd-float16": 8,
    "90:gather-backward-odd-bfloat16": 8,
    "100:gather-49-bfloat16": 12,
    "100:spread-wide": 8,
    "100:spread-backward-wide": 8,
    "90:guarded-49": 8,
    "90:guarded-121": 8,
    "100:newton-25": 12,
    "100:newton_backward-49": 16,
    "100:solve-49": 16,
    "90:solve-128-wide": 8,
    "80:solve_backward-49-wide": 8,
    "80:choice-49": 32,
    "90:choice-odd": 24,
    "100:choice-128-wide": 32,
}
# How many barriers there are: each of the kernels' own is one of them.
BARRIERS = {"90:guarded-121": 39, "80:choice-49": 18, "90:choice-odd": 18}
BARRIERS["100:choice-128-wide"] = 20

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
    "cases",
    [
        tuple(SOON),
        *(
            pytest.param(tuple(f"{arch}:{case}" for case in CASES), marks=pytest.mark.long)
            for arch in ARCHS
        ),
    ],
    ids=("soon", *map(str, ARCHS)),
)
def test_registers_and_shared_memory_suffice(cases, root, tmp_path):
    need_triton()
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    program = root / "tests/helpers/compiled_kernels.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), *cases],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["case"] for kernel in found} == set(cases)
    launched = [kernel["case"] for kernel in found if "spread" not in kernel["case"]]
    launched = [case for case in launched if "gather" not in case]
    assert len(launched) == len(set(launched))  # the products alone take more than one launch
    version = found[0]["triton"]
    spilled, slack = SPILLED.get(version, SPILLED[NEWEST]), SLACK * (version not in SPILLED)
    for kernel in found:
        assert kernel["rounded"] == kernel["products"], kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        # Other warps read rows of the choice, too, before they are overwritten.
        assert kernel["waited"] or kernel["kernel"] != "choice_kernel", kernel
        if version == NEWEST:  # one that the kernel asks for and that is gone makes fewer
            assert kernel["barriers"] >= BARRIERS.get(kernel["case"], 0), kernel
        arch, case = kernel["case"].split(":")
        odd = "_odd" if "odd" in case or "first" in case else ""
        bound = spilled.get(kernel["kernel"] + odd, (0, 0, 0))[ARCHS.index(int(arch))]
        assert kernel["spilled"] <= bound + slack, kernel
        if version == NEWEST:
            assert kernel["resident"] >= SOON.get(kernel["case"], LEAST), kernel
