"""What all tests share."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported, and inherited by the processes that tests start: the tensors of the
# tests are small, and many threads only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Make every test draw the same numbers whenever and in whatever order it runs."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (OpenMMLab's transforms draw from it)
    torch.manual_seed(0)


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
