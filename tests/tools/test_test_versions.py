"""`make test-versions` with stand-ins: no environment is made, and no test runs in it."""

from pathlib import Path

import pytest
from loading import ROOT, load_tool

TORCH, SOUND = "2.1.2", '{"problems": []}'


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program as a module, its commands recorded and answered by stand-ins."""
    module = load_tool("dev/test_versions.py")
    module.commands = []
    # Part of a command -> (status, output).
    module.answers = {"-m pytest": (0, "3 passed, 1 skipped in 0.5s\n"), "_step.py": (0, SOUND)}

    def call(command, log, **environment):
        line = " ".join(command)
        module.commands.append(line)
        if "-m venv" in line:
            Path(command[-1]).mkdir()
        return next((answer for part, answer in module.answers.items() if part in line), (0, ""))

    page = tmp_path / "installation.md"
    page.write_text("before\n<!-- versions -->\n\n<!-- /versions -->\nafter\n")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "call", call)
    module.find_python_for_real = module.find_python
    monkeypatch.setattr(module, "find_python", lambda version: f"python{version}")
    return module


@pytest.fixture
def run(program, tmp_path, monkeypatch):
    """Run one row; gives the exit status and the last two cells of the row, if it is there."""

    def run(*arguments):
        folder = ["--folder", str(tmp_path / "environments")]
        monkeypatch.setattr("sys.argv", ["test_versions.py", TORCH, *folder, *arguments])
        program.commands.clear()
        status = program.main()
        return status, *program.read_results(program.PAGE.read_text()).get(TORCH, [])[3:]

    return run


def installed(program):
    return sum(" install " in command for command in program.commands)


def test_the_tests_of_a_row_exist_and_are_run(program, run):
    assert all((ROOT / path).exists() for path in program.TESTS)
    assert run() == (0, "3 passed, 1 skipped", "passed")
    (tests,) = (command for command in program.commands if "-m pytest" in command)
    assert tests.endswith(" ".join(program.TESTS))
    text = program.PAGE.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("\n| ") == 2 + len(program.ROWS)


@pytest.mark.parametrize(
    ("answer", "cell"),
    [
        ((1, "1 failed, 3 passed in 0.5s"), "1 failed, 3 passed"),
        ((2, "ERROR tests/ops\n2 errors in 0.5s"), "2 errors"),
        ((1, "5 passed, 1 error in 0.5s"), "5 passed, 1 error"),
        ((-11, "....\nFatal Python error: Segmentation fault"), "stopped with status -11"),
        ((3, "5 passed in 0.5s"), "5 passed, stopped with status 3"),
        ((5, "no tests ran in 0.5s"), "stopped with status 5"),
        ((0, "4 skipped in 0.5s"), "4 skipped"),
        ((0, ""), "none ran"),
    ],
)
def test_a_row_passes_only_if_its_tests_end_well_and_some_passed(program, run, answer, cell):
    program.answers["-m pytest"] = answer
    assert run() == (1, cell, "passed")


@pytest.mark.parametrize("answer", [(1, SOUND), (0, '{"problems": ["x is unused"]}'), (0, "")])
def test_a_training_step_passes_only_without_problems(program, run, answer):
    program.answers["_step.py"] = answer
    assert run() == (1, "3 passed, 1 skipped", "failed")


def test_lite_runs_no_step_and_keeps_what_is_known_of_it(program, run):
    assert run("--lite") == (0, "3 passed, 1 skipped", "not run")
    assert not any("_step.py" in command for command in program.commands)
    assert run() == (0, "3 passed, 1 skipped", "passed")
    program.answers["-m pytest"] = (0, "7 passed in 0.5s")
    assert run("--lite") == (0, "7 passed", "passed")


def test_an_environment_is_kept_for_the_same_packages_alone(program, run, monkeypatch):
    counts = []
    for arguments in ([], [], ["--lite"], []):
        run(*arguments)
        counts.append(installed(program))
    assert counts == [4, 0, 3, 0]
    monkeypatch.setattr(program, "PACKAGES", (*program.PACKAGES, "extra==1.0"))
    run()
    assert installed(program) == 4


def test_a_row_without_its_python_is_left_out(program, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "find_python", program.find_python_for_real)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert run() == (0,)
    assert "left out" in capsys.readouterr().out
    python = tmp_path / "python3.10"
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    assert program.find_python_for_real("3.10") == str(python)
    python.write_text("#!/bin/sh\necho 3.9\n")
    with pytest.raises(program.NoPythonError):
        program.find_python_for_real("3.10")


def test_a_set_up_that_fails_goes_on_where_it_stopped(program, run, capsys):
    program.answers[" mmdet=="] = (1, "no network")
    assert run() == (1,)
    assert "`-m pip install ...` failed, see " in capsys.readouterr().out
    del program.answers[" mmdet=="]
    assert run()[0] == 0
    assert installed(program) == 2
