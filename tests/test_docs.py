"""The README, the documentation and the files for contributors.

`make docs` builds the site itself, and checks the links between its pages.
"""

import ast
import importlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest
import yaml
from mmengine.config import Config

import mmsoft
from mmsoft.builder import build_model
from mmsoft.models import SOFTPlusPlus

KB, MB = 1000, 1000**2
TEXTS = ("mmsoft", "tests", "tools", "configs", "docs")
PICTURES = {".jpg", ".png", ".svg"}


@pytest.fixture(scope="module")
def pages(root):
    pages = {path: path.read_text() for path in (root / "docs").rglob("*.md")}
    assert pages
    return pages


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


@pytest.fixture(scope="module")
def texts(root, pages, readme):
    """All pages: path -> text."""
    contributing = root / "CONTRIBUTING.md"
    return {**pages, root / "README.md": readme, contributing: contributing.read_text()}


def width(picture):
    if picture.suffix == ".svg":
        return float(ElementTree.parse(picture).getroot().get("width"))
    return cv2.imread(str(picture)).shape[1]


def test_pictures_exist_are_small_and_have_alt_text(root, texts):
    shown = set()
    for path, text in texts.items():
        for description, target in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
            picture = path.parent / target
            assert description, target
            assert picture.stat().st_size < 150 * KB, target
            assert width(picture) >= 600, target
            shown.add(picture.resolve())
    there = {path.resolve() for path in (root / "docs").rglob("*") if path.suffix in PICTURES}
    # Beside the benchmark's pictures, for print.
    drawings = {path.with_suffix(".svg") for path in shown if path.parent.name == "benchmarks"}
    assert there == shown | drawings
    assert all(path.stat().st_size < 150 * KB for path in drawings)
    assert sum(path.stat().st_size for path in there) < 2 * MB


def test_navigation_and_links_are_complete(root, pages, texts):
    navigation = set(re.findall(r"^ +- .*: (\S+\.md)$", (root / "mkdocs.yml").read_text(), re.M))
    assert navigation == {path.relative_to(root / "docs").as_posix() for path in pages}
    for path, text in texts.items():
        for target in re.findall(r"(?<!!)\[[^][]*?\]\(([^)#]+)", text):
            assert target.startswith("https://") or (path.parent / target).is_file(), target


def source_of(root, program):
    """The text of a tool or of a module's program, and of what it imports from us."""
    path = program if "/" in program else program.replace(".", "/") + "/__main__.py"
    source = (root / path).read_text()
    names = re.findall(r"^from (mmsoft\S*) import", source, re.M)
    ours = ((root / name.replace(".", "/")).with_suffix(".py") for name in names)
    return source + "".join(path.read_text() for path in ours if path.is_file())


def test_commands_name_tools_and_options_that_exist(root, pages):
    found, python = 0, r"^(?:\.venv/bin/)?python (?:-m )?((?:tools/|mmsoft)(?:.*\\\n)*.*)$"
    for text in pages.values():
        for command in re.findall(python, text, re.M):
            words = command.replace("\\\n", " ").split()
            source = source_of(root, words[0])
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert f'"{option}"' in source, f"{words[0]} {option}"
            found += 1
    assert found >= 7


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def test_python_blocks_parse(texts):
    for text in texts.values():
        for block in python_blocks(text):
            ast.parse(block)


def test_make_targets_exist(root, texts):
    known = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.M))
    for path, text in texts.items():
        code = [*re.findall(r"`(make [^`\n]*)`", text), *re.findall(r"^(make .*)$", text, re.M)]
        for command in code:
            for target in command.partition("#")[0].split()[1:]:
                assert target in known or "=" in target, f"{path.name}: {command}"


# -------------------------------------------------------------------------------- the README


def table(text):
    """The rows of the first table in a text, as dicts."""
    lines = re.search(r"^\|.*\n(?:\|.*\n)+", text, re.M).group().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def between(name, text):
    return re.search(f"<!-- {name} -->(.*)<!-- /{name} -->", text, re.S)[1]


def test_readme_is_short(readme):
    assert len(readme.splitlines()) <= 150


def test_readme_python_runs_as_printed(readme, run_outside):
    program, printed = re.search(
        r"^```python\n(import .*?)```\n\n```\n(.*?)```$", readme, re.M | re.S
    ).groups()
    assert len([line for line in program.splitlines() if line]) == 5
    done = run_outside("-c", program)
    assert done.stdout == printed, done.stderr


def test_readme_config_builds(readme, tmp_path):
    """In another process it is tests/test_downstream.py that builds on such a config."""
    pytest.importorskip("mmdet")
    (config,) = (block for block in python_blocks(readme) if block.startswith("_base_"))
    (tmp_path / "config.py").write_text(config)
    backbone = build_model(Config.fromfile(tmp_path / "config.py"), "backbone")
    attention = backbone.stages[0].blocks[0].attn
    assert type(backbone) is SOFTPlusPlus
    assert (attention.max_landmarks, attention.by_content) == (49, True)


def test_readme_results_are_those_of_the_generated_tables(root, readme):
    """Multiply-adds and parameters as counted, accuracies as the model zoo's page has them."""
    counted = {}
    for size in ("224x224", "800x1344"):
        page = (root / "docs/benchmarks.md").read_text()
        rows = table(page.partition(f"**{size}, batch 1, forward, cpu, float32**")[2])
        counted[size] = {row[""]: row for row in rows}
    zoo = table(between("measured", (root / "docs/model_zoo.md").read_text()))
    accuracy = {row["backbone"]: row["top-1, as published (%)"] for row in zoo}
    rows = table(between("results", readme))
    assert len(rows) > 5
    for row in rows:
        name = row["backbone"]
        found = [counted[size][name]["GMACs"] for size in counted]
        found += [counted["224x224"][name]["params (M)"], accuracy[name.partition(",")[0]]]
        columns = ("multiply-adds (G) at 224x224", "at 800x1344", "params (M)")
        assert found == [*(row[c] for c in columns), row["ImageNet top-1, published (%)"]], name


WORDS = "mend|mends|mended|mending|guilty|spoilt|hostile|odd data|argument is off"


def test_language_is_the_fields(root):
    """The words that are not: fix, offending, corrupt, untrusted, malformed, invalid are."""
    files = [*root.glob("*.md"), *(p for d in TEXTS for p in (root / d).rglob("*.*"))]
    files = [path for path in files if path.suffix in (".md", ".py", ".yml")]
    assert len(files) > 200
    found = {path.name for path in files if re.search(rf"\b({WORDS})\b", path.read_text().lower())}
    assert found == {Path(__file__).name}


# ------------------------------------------------------------------------- the API and the layout


def test_the_api_reference_has_every_package(root, pages):
    listed = set()
    for path, text in pages.items():
        if path.parent.name == "api":
            listed |= set(re.findall(r"^::: (\S+)$", text, re.M))
    for name in listed:
        importlib.import_module(name)
    packages = {path.parent.name for path in (root / "mmsoft").glob("*/__init__.py")}
    packages -= {"benchmark", "explore"}  # commands, described on other pages
    assert {f"mmsoft.{name}" for name in packages} <= listed


def test_every_folder_is_in_the_layout(root, pages):
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


def test_ruff_of_the_docs_environment_is_the_pinned_one(root):
    """mkdocstrings formats signatures with it."""
    pins = (root / "requirements/packages.txt").read_text().split()
    (ruff,) = (pin for pin in pins if pin.startswith("ruff=="))
    assert ruff in (root / "requirements/docs/packages.txt").read_text().split()


def test_the_ci_workflow_calls_ci_run(root):
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    versions = [step["with"]["python-version"] for step in steps if "setup-python" in str(step)]
    assert versions == ["3.11"]
    assert "secrets" not in json.dumps(workflow)


def test_long_tests_run_once_a_week(root):
    workflow = yaml.safe_load((root / ".github/workflows/long.yml").read_text())
    (schedule,) = workflow[True]["schedule"]  # YAML reads `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    steps = workflow["jobs"]["test-long"]["steps"]
    assert "make test-long" in [step.get("run") for step in steps]
    assert "secrets" not in json.dumps(workflow["jobs"])


def test_templates_are_complete(root):
    for path in (root / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(content), path.name
            assert all({"type", "id", "attributes"} <= set(field) for field in content["body"])
