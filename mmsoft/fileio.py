"""Atomic writes of files and folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for other processes that are within this for a path of the same folder, which is made.

    Where the system has no locks, as Windows, or the folder none, as on some networks, nothing is
    waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl

            descriptor = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # let go when it is closed, also by a kill
        except (ImportError, OSError):
            pass
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
