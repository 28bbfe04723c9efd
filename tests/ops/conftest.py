"""What the tests of operators share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialized memory with NaN, which torch does only in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
