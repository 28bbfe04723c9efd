"""Build steps that cannot be declared: the ``mmsoft/.mim`` folder.

``mim`` and MMEngine look for a package's configs, tools and model index in its ``.mim`` folder.
Wheels get copies of the three; an editable install gets links, in a folder that git ignores.
Everything else is declared in pyproject.toml and setup.cfg.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM = ("configs", "tools", "model-index.yml")
# Set-up and the generators of tables, in tools/dev, are for checkouts.
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", "dev")


class BuildPyWithMim(build_py):
    """Add ``mmsoft/.mim`` to what build_py makes."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            folder = ROOT / "mmsoft" / ".mim"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in MIM:
                (folder / name).symlink_to(Path("..", "..", name))
            return
        package = Path(self.build_lib, "mmsoft")
        # An earlier build's files, of modules or configs removed since, would enter the wheel.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in MIM:
            source, target = ROOT / name, package / ".mim" / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=IGNORED)
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildPyWithMim})
