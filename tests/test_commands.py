"""Commands of mim as the tools run them."""

from importlib import metadata

import pytest

from mmsoft.commands import CommandError, mim, run_of_library

pytest.importorskip("mim")


def test_a_failing_command_is_one_line_that_names_the_log(tmp_path):
    log = tmp_path / "train.log"
    with pytest.raises(CommandError) as caught:
        mim("title", ["train", "mmdet", "no_such_config.py", "--gpus", "0"], log, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "mim train mmdet no_such_config.py" in message
    assert "no_such_config.py doesn't exist" in message
    assert str(log) in message


def test_the_memory_is_that_of_the_largest_descendant(tmp_path, run_outside):
    """Of a process that a process starts, as mim starts the training script.

    Asked by a small process: what Linux tells of a child includes what its parent had at the fork.
    """
    (tmp_path / "mim.py").write_text(
        "import subprocess, sys, time\n"
        "inner = 'x = 800_000_000 * bytes([1])'\n"
        "subprocess.run([sys.executable, '-c', inner], check=True)\n"
        "time.sleep(0.2)\n"
        "print('done in', sys.argv[1])\n"
    )
    call = (
        "from pathlib import Path; from mmsoft.commands import mim; "
        "usage = mim('title', ['folder'], Path('log'), Path()); "
        "print(usage.peak_bytes, usage.seconds)"
    )
    done = run_outside("-c", call, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    peak_bytes, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert (tmp_path / "log").read_text() == "done in folder\n"
    assert 800e6 < peak_bytes < 1600e6
    assert 0.2 < seconds < 60


def test_arguments_without_a_config_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "config.yml", "--launcher", "none"])
    with pytest.raises(SystemExit, match=r"no config among .* train\.py; its name ends in \.py"):
        run_of_library("train.py", "What it does.")
    for arguments in ([], ["-h"], ["config.py", "--help"]):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        run_of_library("train.py", "What it does.")
        assert capsys.readouterr().out == "usage: train.py CONFIG [options]\n\nWhat it does.\n"


def test_a_base_of_a_library_that_is_not_there(monkeypatch, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'mmpose::hands/hand.py'\n")  # none of ours, and not installed
    monkeypatch.setattr("sys.argv", ["train.py", "--work-dir", "runs/x.py", str(config)])
    with pytest.raises(SystemExit, match=r"error: .*config\.py: mmpose is not installed"):
        run_of_library("train.py", "What it does.")


@pytest.mark.parametrize(
    ("files", "version", "message"),
    [
        (["mmcv/__init__.py"], "3.3.0", "mmdet needs mmcv with its compiled operators, .*mmcv==2"),
        (None, "3.4.0", "mmsoft needs mmdet>=3.3,<3.4, but mmdet 3.4.0 is installed"),
    ],
)
def test_a_library_that_cannot_run_is_said_first(files, version, message, monkeypatch, tmp_path):
    pytest.importorskip("mmdet")
    real = metadata.version
    found = {"mmdet": version}
    monkeypatch.setattr(metadata, "version", lambda name: found.get(name) or real(name))
    monkeypatch.setattr(metadata, "files", lambda name: files)
    monkeypatch.setattr("runpy.run_path", lambda *_, **__: None)
    (tmp_path / "config.py").write_text("default_scope = 'mmdet'\n")
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "config.py")])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run_of_library("train.py", "What it does.")
