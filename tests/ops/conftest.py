"""What the tests of operators share."""

import pytest
import torch
from required import need_triton

from mmsoft.ops import launch, use_backend


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialized memory with NaN, which torch does only in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def kernels(device, monkeypatch):
    """Run everything by Triton: its kernels, or on a CPU their interpreter."""
    need_triton()
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no kernel runs on a GPU that is pretended")
    if device == "cpu":
        monkeypatch.setattr(launch, "DEVICES", {"cpu"})
    with use_backend(launch.TRITON):
        yield
