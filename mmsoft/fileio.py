"""Atomic writes of files and folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write under a temporary name; the file or folder is renamed when the block has ended.

    An earlier file is kept until then, and if the block raises. The temporary name has the same
    suffix; remains of a killed process under it are removed.

    Args:
        path: the file or folder; its parents are made.

    Yields:
        The temporary name, in the same folder.
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
