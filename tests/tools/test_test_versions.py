"""`make test-versions` with stand-ins: no environment is made, and no test runs in it."""

import subprocess
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
        module.compilers.append(environment.get("CXX"))
        if "-m venv" in line:
            Path(command[-1]).mkdir()
        return next((answer for part, answer in module.answers.items() if part in line), (0, ""))

    module.compilers = []
    page = tmp_path / "installation.md"
    page.write_text("before\n<!-- versions -->\n\n<!-- /versions -->\nafter\n")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "call", call)
    module.find_python_for_real = module.find_python
    monkeypatch.setattr(module, "find_python", lambda version: f"python{version}")
    return module


@pytest.fixture
def run(program, tmp_path, monkeypatch):
    """Run one row; gives the exit status, and what tests and step say if the row is there."""

    def run(*arguments):
        folder = ["--folder", str(tmp_path / "environments")]
        monkeypatch.setattr("sys.argv", ["test_versions.py", TORCH, *folder, *arguments])
        program.commands.clear()
        status = program.main()
        return status, *program.read_results(program.PAGE.read_text()).get(TORCH, [])[3:5]

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


def test_lite_is_marked_and_keeps_no_step_of_another_run(program, run):
    assert run() == (0, "3 passed, 1 skipped", "passed")
    assert run("--lite") == (0, "3 passed, 1 skipped, with mmcv-lite", "not run")
    assert not any("_step.py" in command for command in program.commands)
    assert run() == (0, "3 passed, 1 skipped", "passed")


def git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.example", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_a_row_names_the_commit_and_whether_something_differs(program, run, tmp_path, monkeypatch):
    """The page itself may: it is written row by row."""
    root = tmp_path / "checkout"
    monkeypatch.setattr(program, "ROOT", root)
    (root / "docs").mkdir(parents=True)
    (root / "code.py").write_text("a = 1\n")
    git(root, "init", "--quiet")
    assert program.commit() == "-"
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    name = git(root, "rev-parse", "HEAD")[:9]
    (root / "docs/installation.md").write_text("written\n")
    assert program.commit() == name
    run()
    assert program.read_results(program.PAGE.read_text())[TORCH][5] == name
    (root / "code.py").write_text("a = 2\n")
    assert program.commit() == f"{name}-dirty"


def test_rows_of_before_there_were_commits_are_kept(program, run):
    rows = "| Python | torch |\n| --- | --- |\n| 3.11 | 2.13.0 | 2.4.6 | 5 passed | passed |\n"
    program.PAGE.write_text(f"<!-- versions -->\n\n{rows}\n<!-- /versions -->\n")
    run()
    text = program.PAGE.read_text()
    assert "| 3.11 | 2.13.0 | 2.4.6 | 5 passed | passed | - |\n" in text
    assert all(line.count("|") == 7 for line in text.splitlines() if line.startswith("|"))


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
    assert run() == (1,)  # nothing was run
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "no row was run" in printed
    python = tmp_path / "python3.10"
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    assert program.find_python_for_real("3.10") == str(python)
    python.write_text("#!/bin/sh\necho 3.9\n")
    with pytest.raises(program.NoPythonError):
        program.find_python_for_real("3.10")


def test_a_set_up_that_fails_goes_on_where_it_stopped(program, run, capsys):
    """And the row keeps no result of before."""
    assert run("--lite")[0] == 0
    program.answers[" mmdet=="] = (1, "no network")
    assert run() == (1, "build failed", "not run")
    assert "`-m pip install ...` failed, see " in capsys.readouterr().out
    del program.answers[" mmdet=="]
    assert run()[0] == 0
    assert installed(program) == 2


def test_mmcv_is_compiled_as_the_headers_of_its_torch_ask(program, run, monkeypatch):
    """Set-ups of mmcv name C++17 last, which would count."""
    assert run()[0] == 0
    assert not any(program.compilers)
    monkeypatch.setattr(program, "NEEDS_CPP20", f"torch=={TORCH}")
    monkeypatch.setattr(program, "PACKAGES", (*program.PACKAGES, "another==1"))
    assert run()[0] == 0
    (compiler,) = filter(None, program.compilers)
    stub = Path(compiler).with_name("g++")
    stub.write_text('#!/bin/bash\necho "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{stub.parent}:/usr/bin:/bin"}
    command = [compiler, "-O2", "-std=c++17", "a b.cpp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "-O2 -std=c++20 a b.cpp\n"
