"""Dependencies point one way: the import graph of the package."""

import ast
import sys
from pathlib import Path

import pytest

# A room may import those before it, and nothing else of the package.
ORDER = (
    "version",
    "registry",
    "fileio",
    "builder",
    "ops",
    "flops",
    "checkpoint",
    "integration",
    "models",
    "analysis",
    "engine",
    "visualization",
    "benchmark",
)


def imports(path, root):
    """The absolute names of modules that a file imports, wherever in it."""
    package = path.relative_to(root).with_suffix("").parts
    if package[-1] == "__init__":
        package = package[:-1]
        inside = package
    else:
        inside = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def graph(root):
    """Room -> names that its files import."""
    result = {}
    for path in (root / "mmsoft").rglob("*.py"):
        parts = path.relative_to(root / "mmsoft").with_suffix("").parts
        if ".mim" not in parts and parts != ("__init__",):
            result.setdefault(parts[0], []).extend(imports(path, root))
    return result


def test_every_room_has_its_place(graph):
    assert set(graph) == set(ORDER)


def test_no_arrow_points_upward(graph):
    rank = {room: i for i, room in enumerate(ORDER)}
    upward = {
        f"{room} -> {name}"
        for room, names in graph.items()
        for name in names
        if name.startswith("mmsoft.") and rank.get(name.split(".")[1], -1) > rank[room]
    }
    assert not upward


@pytest.mark.parametrize(
    ("room", "allowed"), [("ops", {"torch"}), ("analysis", None), ("visualization", None)]
)
def test_third_parties_of_a_room(graph, room, allowed):
    others = {name.split(".")[0] for name in graph[room]} - {"mmsoft", *sys.stdlib_module_names}
    if allowed is None:  # numbers know no pictures, and pictures no models
        allowed = others - ({"matplotlib"} if room == "analysis" else {"torch", "mmengine"})
    assert others <= allowed


def test_the_package_itself_imports_no_model(root):
    names = set(imports(root / "mmsoft/__init__.py", root))
    assert not {n for n in names if n.startswith(("mmsoft.models", "mmsoft.engine", "torch"))}


def test_a_file_that_breaks_the_order_is_seen(tmp_path):
    """The test's own eyes: relative and absolute imports, inside functions too."""
    path = tmp_path / "mmsoft/ops/deep.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..models import SOFT\ndef f():\n    import mmsoft.engine as e\n")
    found = set(imports(Path(path), tmp_path))
    assert {"mmsoft.models", "mmsoft.models.SOFT", "mmsoft.engine"} <= found
