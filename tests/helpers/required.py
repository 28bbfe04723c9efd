"""What tests are skipped without, but where a workflow installs it."""

import os
from typing import NoReturn

import pytest

from mmsoft.ops import launch


def missing(variable: str, reason: str) -> NoReturn:
    """Skip the test, or fail it: in a workflow that sets the variable to "required"."""
    if os.environ.get("CI") and os.environ.get(variable) == "required":
        pytest.fail(f"{reason}, which the workflow is to install")
    pytest.skip(reason)


def need_triton() -> None:
    """Skip or fail the test if no kernel can run in this environment."""
    if reason := launch.lacking():
        missing("MMSOFT_TRITON", reason)
