"""The profile of a config's backbone."""

import runpy

import pytest

CONFIG = """
default_scope = "mmengine"
arch = dict(depths=[1, 1, 1, 1], embed_dims=[32, 32, 32, 32], num_heads=[1, 1, 1, 1])
model = dict(backbone=dict(type="mmsoft.SOFTPlusPlus", arch=arch))
"""


@pytest.fixture
def run(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    tools = root / "tools/analysis_tools"
    monkeypatch.syspath_prepend(tools)
    main = runpy.run_path(str(tools / "profile_operators.py"))["main"]

    def run(*arguments):
        command = ["profile_operators.py", str(tmp_path / "config.py"), *arguments]
        monkeypatch.setattr("sys.argv", command)
        main()
        return capsys.readouterr().out.splitlines()

    return run


def test_times_add_up_and_the_rest_is_not_lost(run):
    head, *rows, total = run("--shape", "64", "96", "--top", "5")
    assert head.split() == ["operator", "calls", "ms", "share"]
    assert len(rows) == 6
    assert rows[-1].startswith("the rest")
    times = [float(row.split()[-2]) for row in rows]
    assert times[:-1] == sorted(times[:-1], reverse=True)
    assert sum(times) == pytest.approx(float(total.split()[-1]), abs=0.5)
    assert any(row.startswith("addmm") for row in run("--top", "200"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--shape", "1", "2", "3"), "--shape takes one or two"), (("--top", "0"), "--top take pos")],
)
def test_bad_arguments_are_one_line(run, capsys, arguments, words):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert words in capsys.readouterr().err
