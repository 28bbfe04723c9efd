"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write under a temporary name; the file or folder gets its own once the block has ended.

    An earlier file stays as it is until then, and for good if the block raises. The temporary name
    has the same suffix; what a killed process left under it is removed.

    Args:
        path: the file or folder; its parents are made.

    Yields:
        The temporary name, beside ``path``.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # or a power cut could leave an empty file under the final name
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
