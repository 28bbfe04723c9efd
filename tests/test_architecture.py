"""Dependencies point one way: the import graph of the package."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

# A package may import those before it, and nothing else of mmsoft.
ORDER = (
    "version",
    "installed",
    "registry",
    "fileio",
    "datasets",
    "safe_globals",
    "conversion",
    "builder",
    "ops",
    "flops",
    "checkpoint",
    "integration",
    "commands",
    "models",
    "analysis",
    "export",
    "engine",
    "visualization",
    "benchmark",
    "rows",
    "explore",
)


def imports(path, root):
    """The absolute names of modules that a file imports, also inside functions and by a call."""
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
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@pytest.fixture(scope="module")
def graph(root):
    """Package or module -> names that its files import."""
    result = {}
    for path in (root / "mmsoft").rglob("*.py"):
        parts = path.relative_to(root / "mmsoft").with_suffix("").parts
        if ".mim" not in parts and parts != ("__init__",):
            result.setdefault(parts[0], []).extend(imports(path, root))
    return result


def test_every_package_is_in_the_order(graph):
    assert set(graph) == set(ORDER)


def test_no_package_imports_a_later_one(graph):
    rank = {part: i for i, part in enumerate(ORDER)}
    upward = {
        f"{part} -> {name}"
        for part, names in graph.items()
        for name in names
        if name.startswith("mmsoft.") and rank.get(name.split(".")[1], -1) > rank[part]
    }
    assert not upward


def test_no_circle_of_modules(root):
    """Not even inside a room, or by an import inside a function."""
    files = (path.relative_to(root) for path in (root / "mmsoft").rglob("*.py"))
    names = {".".join(f.with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    graph = {
        name: {
            found
            for found in imports(root / file, root)
            # A module has its packages already.
            if found in names and not f"{name}.".startswith(f"{found}.")
        }
        for name, file in names.items()
        if ".mim" not in file.parts
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


NUMBERS = {
    *("cv2", "mmengine", "numpy", "nystrom_attention", "performer_pytorch", "pycocotools", "torch"),
}


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("ops", {"numpy", "scipy", "torch", "triton"}),
        ("analysis", {*NUMBERS, "mmsoft.builder", "mmsoft.models", "mmsoft.ops"}),
        # Pillow comes with matplotlib, which writes its pixels by it
        ("visualization", {"matplotlib", "PIL", "numpy", "mmsoft.fileio"}),
    ],
)
def test_operators_need_torch_alone_numbers_no_pictures_and_pictures_no_models(
    graph, part, allowed
):
    found = {
        ".".join(name.split(".")[: 2 if name.startswith("mmsoft.") else 1]) for name in graph[part]
    }
    assert found - {f"mmsoft.{part}", *sys.stdlib_module_names} <= allowed


def test_scipy_is_imported_by_one_file_that_runs_when_asked(root):
    """Operators need torch alone."""
    for path in (root / "mmsoft/ops").rglob("*.py"):
        found = {name.partition(".")[0] for name in imports(path, root)}
        assert bool(found & {"numpy", "scipy"}) == (path.name == "lapack.py"), path
        assert not any(
            name.startswith("mmsoft.ops.landmarks.lapack") for name in imports(path, root)
        )


def test_triton_is_imported_by_the_files_of_kernels_alone(root):
    """And these by their name, when they run."""
    for path in (root / "mmsoft").rglob("*.py"):
        found = {name.partition(".")[0] for name in imports(path, root)}
        assert ("triton" in found) == (path.name == "triton.py"), path
        assert not any(
            alias.name == "triton"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ), path


def test_mmsoft_itself_imports_no_model(root):
    names = set(imports(root / "mmsoft/__init__.py", root))
    assert not {n for n in names if n.startswith(("mmsoft.models", "mmsoft.engine", "torch"))}


def test_relative_nested_and_called_imports_are_found(tmp_path):
    path = tmp_path / "mmsoft/ops/deep.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..models import SOFT\ndef f():\n    import mmsoft.engine as e\n"
        "importlib.import_module('mmsoft.flops')\n"
    )
    found = set(imports(Path(path), tmp_path))
    assert {"mmsoft.models", "mmsoft.models.SOFT", "mmsoft.engine", "mmsoft.flops"} <= found
