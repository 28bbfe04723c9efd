"""The documentation: its pictures, links and commands. `make docs` builds the site itself."""

import ast
import importlib
import json
import re

import cv2
import pytest
import yaml

import mmsoft

KB, MB = 1000, 1000**2


@pytest.fixture(scope="module")
def pages(root):
    pages = {path: path.read_text() for path in (root / "docs").rglob("*.md")}
    assert pages
    return pages


def test_pictures_exist_are_small_and_have_a_description(root, pages):
    shown = set()
    for path, text in pages.items():
        for description, target in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
            picture = path.parent / target
            assert description, target
            assert picture.stat().st_size < 150 * KB, target
            assert cv2.imread(str(picture)).shape[1] >= 600, target
            shown.add(picture.resolve())
    there = {path.resolve() for path in (root / "docs").rglob("*.png")}
    assert there == shown
    assert sum(path.stat().st_size for path in there) < 1.5 * MB


def test_every_page_is_in_the_navigation_and_links_lead_somewhere(root, pages):
    navigation = set(re.findall(r"^ +- .*: (\S+\.md)$", (root / "mkdocs.yml").read_text(), re.M))
    assert navigation == {path.relative_to(root / "docs").as_posix() for path in pages}
    for path, text in pages.items():
        for target in re.findall(r"(?<!!)\[.*?\]\(([^)#]+)", text):
            assert target.startswith("https://") or (path.parent / target).is_file(), target


def source_of(root, program):
    """The text of a tool or of a module's program, and of what it imports from us."""
    path = program if "/" in program else program.replace(".", "/") + "/__main__.py"
    source = (root / path).read_text()
    names = re.findall(r"^from (mmsoft\S*) import", source, re.M)
    ours = ((root / name.replace(".", "/")).with_suffix(".py") for name in names)
    return source + "".join(path.read_text() for path in ours if path.is_file())


def test_commands_name_tools_and_options_that_exist(root, pages):
    found = 0
    for text in pages.values():
        for command in re.findall(r"^python (?:-m )?((?:tools/|mmsoft)(?:.*\\\n)*.*)$", text, re.M):
            words = command.replace("\\\n", " ").split()
            source = source_of(root, words[0])
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert f'"{option}"' in source, f"{words[0]} {option}"
            found += 1
    assert found >= 7


def test_python_blocks_are_python(pages):
    for text in pages.values():
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
            ast.parse(block)


def test_the_reference_has_every_package_and_names_what_exists(root, pages):
    listed = set()
    for path, text in pages.items():
        if path.parent.name == "api":
            listed |= set(re.findall(r"^::: (\S+)$", text, re.M))
    for name in listed:
        importlib.import_module(name)
    packages = {path.parent.name for path in (root / "mmsoft").glob("*/__init__.py")}
    assert {f"mmsoft.{name}" for name in packages} <= listed


def test_the_rooms_are_described(root, pages):
    text = pages[root / "docs/layout.md"]
    folders = {path.parent for path in (root / "mmsoft").glob("**/__init__.py")}
    folders |= {path.parent for path in (root / "tools").glob("*/*.py")}
    for folder in folders - {root / "mmsoft"}:
        name = folder.relative_to(root).as_posix()
        assert f"`{name}/" in text or f"`{folder.name}/`" in text, name


# ------------------------------------------------------------------------------- contributing


def test_versions_agree(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.M)[1]
    assert mmsoft.__version__ == citation["version"] == newest


def test_commit_hooks_are_those_of_make(root):
    pins = (root / "requirements/packages.txt").read_text().split()
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["name"] for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    for hook in hooks:
        if hook["language"] == "system":  # of .venv, which has the pinned versions
            assert hook["entry"].startswith(".venv/bin/")
        else:
            assert set(hook["additional_dependencies"]) <= set(pins)


def test_the_sites_linter_is_the_pinned_one(root):
    """mkdocstrings formats signatures with it."""
    pins = (root / "requirements/packages.txt").read_text().split()
    (ruff,) = (pin for pin in pins if pin.startswith("ruff=="))
    assert ruff in (root / "requirements/docs/packages.txt").read_text().split()


def test_continuous_integration_runs_what_a_submission_runs(root):
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    versions = [step["with"]["python-version"] for step in steps if "setup-python" in str(step)]
    assert versions == ["3.11"]
    assert "secrets" not in json.dumps(workflow)


def test_templates_are_complete(root):
    for path in (root / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(content), path.name
            assert all({"type", "id", "attributes"} <= set(field) for field in content["body"])
