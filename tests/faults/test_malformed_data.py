"""Malformed data through the real runner: at least as well as stock Swin in the same pipeline."""

import re

import malformed_data
import pytest

for library in ("mmdet", "mmseg"):
    pytest.importorskip(library)
pytestmark = pytest.mark.cpu(reason="files, in processes of their own")


@pytest.mark.long
@pytest.mark.parametrize(("name", "model"), malformed_data.JOBS)
def test_outcome_is_that_of_swin_or_better_and_documented(name, model, shapes):
    results = {
        label: malformed_data.outcome(shapes, name, model, backbone)
        for label, backbone in malformed_data.MODELS.items()
    }
    assert results["SOFT++"] in ("trains, evaluates", results["Swin"])
    documented = f"| {name} | {model} | " + " | ".join(results.values()) + " |"
    assert documented in re.sub(" +", " ", malformed_data.PAGE.read_text()).splitlines()
