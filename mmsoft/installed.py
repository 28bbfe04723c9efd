"""Which versions of other packages are installed, and whether they will do.

Only package metadata is read; nothing is imported.
"""

import sys
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version


def check_version(name: str, distributions: tuple[str, ...], wanted: str, advice: str = "") -> None:
    """Check that a package is installed in a version of a range.

    Args:
        name: of the package.
        distributions: those that provide it.
        wanted: the range.
        advice: what the message ends with.

    Raises:
        ImportError: it is missing or out of range. The message names the version found and the
            range wanted. (See :func:`error_type`.)
    """
    found = installed_version(distributions)
    if found is None:
        raise error_type()(f"mmsoft needs {name}{wanted}, but {name} is not installed.{advice}")
    # Without suffixes: 2.13.0+cpu and vendors' 2.6.0a0+git are what they are builds of.
    if not SpecifierSet(wanted).contains(Version(found).base_version):
        raise error_type()(f"mmsoft needs {name}{wanted}, but {name} {found} is installed.{advice}")


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of them that is installed."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_before(found: str | None, version: str) -> bool:
    """Whether a version is older, suffixes aside."""
    return found is not None and Version(Version(found).base_version) < Version(version)


def error_type() -> type[Exception]:
    """An ImportError, or a RuntimeError where MMEngine would not show it."""
    # `type='mmsoft.X'` makes MMEngine import us inside a `try` that drops ImportErrors: the user
    # would only read that X is not registered. With `custom_imports` it raises another one.
    swallow = "mmengine/registry/registry.py", "mmengine/utils/misc.py"
    return RuntimeError if any(map(is_called_by, swallow)) else ImportError


def is_called_by(file: str) -> bool:
    """Whether a function of a file, named by the end of its path, is running."""
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None
