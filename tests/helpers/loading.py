"""Tools as modules, which are scripts and in no package, and configs for short runs."""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

from mmengine.config import Config, config, utils

ROOT = Path(__file__).resolve().parents[2]


def load_tool(path, root=ROOT):
    """Import a script of tools/ again, e.g. `dev/setup_env.py`."""
    path = Path(root, "tools", path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_config(path):
    """A config that MMEngine does not format, as it does four times in a run, for seconds.

    ``Config.fromfile`` has an option for that, and forgets it.
    """
    content = Config.fromfile(path).to_dict()
    return Config(content, filename=str(path), format_python_code=False)


def look_up_once():
    """In this process: MMEngine reads a library's metafiles, a hundred, and asks whether it is
    installed anew for every base of a config.
    """
    if not hasattr(utils.load, "cache_info"):
        utils.load = lru_cache(maxsize=None)(utils.load)
        config.is_installed = lru_cache(maxsize=None)(config.is_installed)
