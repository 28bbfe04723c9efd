"""The set-up program on machines where something is missing or goes wrong.

A copy of the program runs in a folder of its own, with stand-ins for pip and the virtual
environment: nothing is downloaded or compiled.
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from loading import load_tool

DROPPED = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'NewConnectionError'\nERROR: No matching distribution found for torch==2.13.0\n"
)
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
ALL_STEPS = ["venv", "torch", "packages", "mmcv", "no-deps", "mmsoft", "checked"]


@pytest.fixture
def checkout(root, tmp_path):
    """A folder with all that the program reads."""
    checkout = tmp_path / "checkout"
    (checkout / "mmsoft" / ".mim").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "mmsoft/version.py"):
        shutil.copyfile(root / name, checkout / name)
    for name in ("requirements", "tools/dev"):
        shutil.copytree(root / name, checkout / name)
    return checkout


@pytest.fixture
def program(checkout, tmp_path, monkeypatch):
    """The program as a module, its commands recorded and answered by stand-ins."""
    module = load_tool("dev/setup_env.py", checkout)
    module.quiet_run_for_real, module.logged_run_for_real = module.quiet_run, module.logged_run
    module.commands, module.settings = [], []
    module.answers = {}  # part of a command -> (status, output), or an exception to raise

    def logged_run(command, **settings):
        line = " ".join(map(str, command))
        module.commands.append(line)
        module.settings.append(settings)
        for part, answer in module.answers.items():
            if part in line:
                if isinstance(answer, BaseException):
                    raise answer
                return answer
        if "-m venv" in line:
            (module.VENV / "lib/python3.11/site-packages").mkdir(parents=True)
        if "pip --disable-pip-version-check --no-input wheel" in line:
            make_wheel(Path(command[command.index("-w") + 1]))
        return 0, ""

    monkeypatch.setattr(module, "WANTED_PYTHON", sys.version_info[:2])
    monkeypatch.setattr(module, "RETRY_AFTER", (0, 0))
    monkeypatch.setattr(module, "logged_run", logged_run)
    monkeypatch.setattr(module, "quiet_run", lambda *command: True)
    monkeypatch.setattr(module, "check_machine", lambda: None)
    monkeypatch.setattr(module, "wheel_folder", lambda: tmp_path / "wheels")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def make_wheel(folder, member="mmcv/_ext.so"):
    system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    path = folder / f"mmcv-2.1.0-cp311-cp311-{system}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "x" * 1000)
    return path


def done(program):
    steps = json.loads(program.STATE.read_text())["done"]
    return [step.split()[0] for step in steps]


def one_line(capsys):
    """The one line of the error output."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("setup: ")
    return error


def test_all_steps_run_once(program):
    assert program.main() == 0
    assert done(program) == ALL_STEPS
    program.commands.clear()
    assert program.main() == 0
    assert program.commands == []


def test_pip_is_held_to_the_pins_and_mmcv_gets_its_cpu_operators(program, checkout):
    assert program.main() == 0
    constraints = f"-c {checkout / 'requirements/constraints.txt'}"
    for name in ("build.txt", "packages.txt", "no-deps.txt"):
        assert sum(c.endswith(f"{name} {constraints}") for c in program.commands) == 1
    (compiled,) = (s for c, s in zip(program.commands, program.settings) if "input wheel" in c)
    assert (compiled["MMCV_WITH_OPS"], compiled["FORCE_CUDA"]) == ("1", "0")


def test_commands_are_not_led_out_of_the_environment(program, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    environment = program.clean_environment(MAX_JOBS="2")
    assert "elsewhere" not in environment.values()
    assert (environment["PYTHONNOUSERSITE"], environment["MAX_JOBS"]) == ("1", "2")
    assert environment["PATH"] == os.environ["PATH"]


def test_an_environment_is_intact_if_every_pin_is_there(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "quiet_run", program.quiet_run_for_real)
    monkeypatch.setattr(program, "PYTHON", sys.executable)
    monkeypatch.setattr(program, "REQUIREMENTS", tmp_path)
    for version, intact in ((pytest.__version__, True), ("0.1", False)):
        (tmp_path / "packages.txt").write_text(f"# a comment\npytest=={version}\n")
        assert program.intact() is intact


def test_a_second_set_up_waits_for_the_first(program, checkout, monkeypatch):
    said = []
    handle = os.open(checkout, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)

    def say(text):
        said.append(text)
        if "waiting" in text:
            assert program.commands == []
            fcntl.flock(handle, fcntl.LOCK_UN)  # the first has ended

    monkeypatch.setattr(program, "say", say)
    assert program.main() == 0
    os.close(handle)
    assert said[0] == "another set-up is running here; waiting for it"
    assert done(program) == ALL_STEPS


def test_what_is_interrupted_leaves_no_compiler_running(program, monkeypatch):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "HEARTBEAT", 1)
    monkeypatch.setattr(program, "say", interrupt)
    program.VENV.mkdir()
    with pytest.raises(KeyboardInterrupt):
        program.logged_run_for_real(["sh", "-c", "sleep 600 & echo PID $!; wait"])
    child = Path("/proc", program.LOG.read_text().split("PID ")[-1].strip())
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_checkout_without_links_is_installed_again(program, checkout):
    """`git clean` removes them: mim then finds neither configs nor tools."""
    assert program.main() == 0
    program.commands.clear()
    (checkout / "mmsoft/.mim").rmdir()
    assert program.main() == 0
    assert ["-e" in command for command in program.commands] == [True, False]


def test_wrong_python(program, monkeypatch, capsys):
    monkeypatch.setattr(program, "WANTED_PYTHON", (3, 99))
    assert program.main() == 1
    line = one_line(capsys)
    assert "needs Python 3.99" in line
    assert sys.executable in line
    assert not program.VENV.exists()


def test_missing_compiler(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "git"):
        (tools / name).symlink_to("/bin/true")
    process = subprocess.run(
        [sys.executable, checkout / "tools/dev/setup_env.py"],
        env={**os.environ, "PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("setup: missing: gcc, g++")
    assert "apt install gcc g++" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_machine_without_headers_or_space(checkout, monkeypatch):
    module = load_tool("dev/setup_env.py", checkout)
    monkeypatch.setattr(module.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(module.SetupError, match=r"disk is full: .* 1\.0 GB are free"):
        module.check_machine()
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: "nowhere")
    with pytest.raises(module.SetupError, match=r"missing: python3\.11-dev;"):
        module.check_machine()


def test_network_lost_and_found(program, capsys):
    program.answers["packages.txt"] = (1, DROPPED)
    assert program.main() == 1
    assert one_line(capsys) == (
        "setup: the network failed; check the connection, then give the same command again; "
        "what is done is kept\n"
    )
    assert sum("packages.txt" in command for command in program.commands) == 3
    assert done(program) == ["venv", "torch"]

    program.answers.clear()
    program.commands.clear()
    assert program.main() == 0
    assert "packages.txt" in program.commands[0]
    assert done(program) == ALL_STEPS


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ((1, FULL), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        ((1, "fatal error: Python.h: No such file or directory\n"), "headers are missing"),
        ((1, "c++: fatal error: Killed signal terminated program cc1plus\n"), "out of memory"),
        ((1, "noise\nERROR: some reason\n  more noise\n"), "ERROR: some reason"),
        (KeyboardInterrupt(), "the same command goes on"),
    ],
)
def test_a_step_fails_with_one_line_and_the_next_call_recovers(program, capsys, trouble, expected):
    program.answers["no-input wheel"] = trouble
    assert program.main() == 1
    assert expected in one_line(capsys)
    assert done(program) == ["venv", "torch", "packages"]
    assert list((program.wheel_folder()).iterdir()) == []  # no half-made wheel is left
    program.answers.clear()
    assert program.main() == 0
    assert done(program) == ALL_STEPS


def test_changed_requirements_rebuild_from_nothing(program, checkout, capsys):
    assert program.main() == 0
    (program.VENV / "leftover").touch()
    with (checkout / "requirements/packages.txt").open("a") as file:
        file.write("extra==1.0\n")
    assert program.main() == 0
    assert "building .venv again" in capsys.readouterr().out
    assert not (program.VENV / "leftover").exists()
    assert done(program) == ALL_STEPS


def test_changed_metadata_reinstalls_only_mmsoft(program, checkout):
    assert program.main() == 0
    program.commands.clear()
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert program.main() == 0
    assert ["-e" in command for command in program.commands] == [True, False]


def test_damaged_environment_is_built_again(program, monkeypatch, capsys):
    assert program.main() == 0
    monkeypatch.setattr(program, "quiet_run", lambda *command: False)
    assert program.main() == 0
    assert "changed or removed" in capsys.readouterr().out
    assert done(program) == ALL_STEPS


def test_unreadable_state_is_built_again(program):
    assert program.main() == 0
    program.STATE.write_text("{")
    program.commands.clear()
    assert program.main() == 0
    assert "-m venv" in program.commands[0]


def test_environment_of_somebody_else_is_moved_aside(program, checkout):
    program.VENV.mkdir()
    (program.VENV / "precious").touch()
    assert program.main() == 0
    (aside,) = checkout.glob(".venv.old-*")
    assert (aside / "precious").exists()


def test_half_installed_packages_are_installed_again(program):
    program.answers["packages.txt"] = KeyboardInterrupt()
    assert program.main() == 1
    site_packages = program.VENV / "lib/python3.11/site-packages"
    whole, half = site_packages / "whole-1.dist-info", site_packages / "half-1.dist-info"
    whole.mkdir()
    (whole / "INSTALLER").touch()
    half.mkdir()
    program.answers.clear()
    assert program.main() == 0
    assert whole.exists()
    assert not half.exists()


def test_packages_that_do_not_import_are_built_once_more(program, capsys):
    make_wheel_folder(program)
    program.answers["import cv2"] = (1, "Traceback\nImportError: libfoo.so\n")
    assert program.main() == 1
    assert "a package does not work: ImportError: libfoo.so" in one_line(capsys)
    assert sum("-m venv" in command for command in program.commands) == 2
    assert sum("no-input wheel" in command for command in program.commands) == 1


def make_wheel_folder(program):
    program.wheel_folder().mkdir()
    return make_wheel(program.wheel_folder())


def test_cached_wheel_saves_the_compilation(program):
    make_wheel_folder(program)
    assert program.main() == 0
    assert not any("no-input wheel" in command for command in program.commands)


def test_damaged_cached_wheel_is_compiled_again(program):
    wheel = make_wheel_folder(program)
    wheel.write_bytes(wheel.read_bytes()[:50])
    assert program.main() == 0
    assert any("no-input wheel" in command for command in program.commands)
    assert program.is_sound(wheel)


def test_wheel_without_operators_is_refused(program, capsys, monkeypatch):
    monkeypatch.setattr(program, "is_sound", lambda wheel: False)
    assert program.main() == 1
    assert "without its operators" in one_line(capsys)
