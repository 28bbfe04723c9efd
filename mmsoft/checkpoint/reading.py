"""Read a checkpoint from anywhere without running anything that it might contain."""

import mmap
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner.checkpoint import CheckpointLoader

from mmsoft.safe_globals import load

from .unpickling import ClaimCheck

HTTP = ("http://", "https://")


def read_checkpoint(path: str | Path, map_location: Any = "cpu", lazily: bool = False) -> Any:
    """Read a checkpoint without running anything that it might contain.

    Args:
        path: a local file, or a URL or other scheme that MMEngine knows.
        map_location: as in :func:`torch.load`.
        lazily: leave the tensors of a local file on the disk until they are used, where the file is
            in torch's present format.

    Raises:
        ValueError: the file is not a checkpoint, is truncated, holds objects other than tensors,
            plain values, ``argparse.Namespace`` and what MMEngine's own checkpoints hold, or would
            unpack to more than its size.
    """
    if "://" in str(path) and not str(path).startswith(HTTP):
        with refusals(path):
            return CheckpointLoader.load_checkpoint(str(path), map_location)
    path = download(path) if str(path).startswith(HTTP) else Path(path).expanduser()
    with refusals(path):
        lazily = check_claims(path) and lazily
        return load(str(path), map_location, mmap=lazily)


def download(url: str | Path) -> Path:
    """Fetch a file once, into torch's cache; every process gets its path."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(str(url)).path).name)
    if get_rank() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(url), str(path), progress=os.isatty(0))
    barrier()
    if not path.exists():  # the main process has another disk
        torch.hub.download_url_to_file(str(url), str(path), progress=False)
    return path


def check_claims(path: Path) -> bool:
    """Refuse a file that would unpack to more than its size, or that holds a TorchScript program.

    Returns:
        Whether it is in torch's present format, a zip file.
    """
    size = path.stat().st_size
    check = ClaimCheck(size)
    with open(path, "rb") as file:
        if size == 0:
            raise EOFError("it is empty")
        if file.read(4) == b"PK\3\4":  # as torch tells them apart
            if not zipfile.is_zipfile(file):
                raise EOFError("truncated, its table of contents at the end is missing")
            reader = torch._C.PyTorchFileReader(str(path))
            # torch.load hands such an archive to torch.jit.load before it reads a pickle.
            records = [name.lower() for name in reader.get_all_records()]  # below the root folder
            if any(name == "constants.pkl" or name.startswith("code/") for name in records):
                raise UnpicklingError(
                    "refused: a TorchScript archive, which is a program; nothing in it was run"
                )
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > size:
                raise UnpicklingError("refused: its content unpacks to more than the file's size")
            check.follow(BytesIO(reader.get_record("data.pkl")))
            return True
        if tarfile.is_tarfile(path):
            raise UnpicklingError("refused: torch's format of 2016, a tar file")
        if path.suffix != ".safetensors":  # torch's older format: five pickles before the tensors
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for _ in range(5):
                    check.follow(content)
        return False


@contextmanager
def refusals(path: str | Path) -> Iterator[None]:
    """Raise a ValueError that says what is wrong with the file, and not how to load it anyway."""
    try:
        yield
    except UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        refused = re.search(r"refused:? (.*)", str(error))
        if refused:
            raise ValueError(f"{path} is refused: {refused[1]}") from None
        if unsafe is None:
            raise ValueError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from None
        raise ValueError(
            f"{path} is refused and nothing in it was run: it pickles {unsafe[1]}, where a "
            "checkpoint may hold only tensors, plain values and argparse.Namespace"
        ) from None
    except (OSError, ImportError):
        raise
    except Exception as error:  # torch's readers raise many kinds for corrupt files
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason[0]}") from error
