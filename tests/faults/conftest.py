"""The data of the tests here, made once."""

import pytest
from hypothesis import settings
from mmengine.registry import init_default_scope

# For test_fuzz.py: in the suite, the same examples every time; and in `make fuzz`.
settings.register_profile("quick", max_examples=60, derandomize=True, database=None)
settings.register_profile("fuzz", max_examples=200)


@pytest.fixture(scope="session")
def shapes(root, tmp_path_factory):
    """A folder with data/shapes in it, not to be written to."""
    from fault_runs import make_data

    folder = tmp_path_factory.mktemp("shapes")
    make_data(root, folder)
    return folder


@pytest.fixture(autouse=True)
def _default_scope():
    yield
    init_default_scope("mmengine")
