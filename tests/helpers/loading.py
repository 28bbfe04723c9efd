"""Tools as modules: they are scripts, in no package."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_tool(path, root=ROOT):
    """Import a script of tools/ again, e.g. `dev/setup_env.py`."""
    path = Path(root, "tools", path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
