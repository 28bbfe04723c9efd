"""Malformed data through the real runner: at least as well as stock Swin in the same pipeline."""

import re

import malformed_data
import pytest

for library in ("mmdet", "mmseg"):
    pytest.importorskip(library)

JOBS = [(name, model) for name, (models, _) in malformed_data.CASES.items() for model in models]


@pytest.mark.long
@pytest.mark.parametrize(("name", "model"), JOBS)
def test_at_least_as_well_as_swin_and_as_documented(name, model, shapes):
    results = {
        label: malformed_data.outcome(shapes, name, model, backbone)
        for label, backbone in malformed_data.MODELS.items()
    }
    assert results["SOFT++"] in ("trains, evaluates", results["Swin"])
    documented = f"| {name} | {model} | " + " | ".join(results.values()) + " |"
    assert documented in re.sub(" +", " ", malformed_data.PAGE.read_text()).splitlines()
