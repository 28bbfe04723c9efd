"""The profile of a config's backbone."""

from functools import partial

import pytest

CONFIG = """
default_scope = "mmengine"
arch = dict(depths=[1, 1, 1, 1], embed_dims=[32, 32, 32, 32], num_heads=[1, 1, 1, 1])
model = dict(backbone=dict(type="mmsoft.SOFTPlusPlus", arch=arch))
"""


@pytest.fixture
def profile(run_tool, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return partial(run_tool, "analysis_tools/profile_operators.py", tmp_path / "config.py")


def test_times_add_up_and_the_rest_is_summed(profile):
    _, printed, _ = profile("--shape", "64", "96", "--top", "5")
    head, *rows, total = printed.splitlines()
    assert head.split() == ["operator", "calls", "ms", "share"]
    assert len(rows) == 6
    assert rows[-1].startswith("the rest")
    times = [float(row.split()[-2]) for row in rows]
    assert times[:-1] == sorted(times[:-1], reverse=True)
    assert sum(times) == pytest.approx(float(total.split()[-1]), abs=0.5)
    assert any(row.startswith("addmm") for row in profile("--top", "200")[1].splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--shape", "1", "2", "3"), "--shape takes one or two"), (("--top", "0"), "--top take pos")],
)
def test_bad_arguments_are_one_line(profile, arguments, words):
    status, _, errors = profile(*arguments)
    assert status == 2
    assert words in errors
