"""What converters and generators of data sets share: COCO files, problems, complete folders."""

import argparse
import filecmp
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from mmengine.utils import ProgressBar

from mmsoft.fileio import one_at_a_time, write_whole

T = TypeVar("T")


def parse_args(description: str) -> argparse.Namespace:
    """The command line of a converter: `source`, a cloned repository, and `out`, both paths."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the cloned repository")
    parser.add_argument("out", type=Path, help="folder to write")
    return parser.parse_args()


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not below ``smallest``."""

    def integer(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {text}")
        return int(text)

    return integer


def generator_parser(description: str, sizes: dict[str, int], what: str) -> argparse.ArgumentParser:
    """The command line of a generator: ``out``, the size of each split, ``--seed``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    for split, size in sizes.items():
        parser.add_argument(f"--{split}", type=at_least(1), default=size, help=f"{what} ({size})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="same seed, same data (0)")
    return parser


def write_once(out: Path, parameters: dict[str, Any], write: Callable[[Path], None]) -> bool:
    """Write a generated data set, whole or not at all, and once if several processes begin at once.

    Args:
        out: the folder, which gets ``parameters.json`` too.
        parameters: all that the data depend on.
        write: fills a folder.

    Returns:
        False if it is there already, with these parameters.

    Raises:
        FileExistsError: the folder has something else in it.
    """
    stamp = out / "parameters.json"
    with one_at_a_time(out):
        if stamp.is_file() and json.loads(stamp.read_text()) == parameters:
            return False
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"{out} exists and is not this data set (other parameters?): remove it or choose "
                "another folder"
            )
        with write_whole(out) as partial:
            partial.mkdir()
            write(partial)
            (partial / stamp.name).write_text(json.dumps(parameters, indent=2) + "\n")
    return True


def generate(out: Path, make: Callable[[], bool]) -> None:
    """Call what :func:`write_once` does and say so; exit with one line if it cannot be done."""
    try:
        new = make()
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"\nerror: cannot write the data set {out}: {error.strerror or error}; "
            "nothing was left behind, fix that and run it again"
        )
    print(f"{out}: " + ("written" if new else "complete already, kept"))


class Problems:
    """Files that could not be used, and why: named at once, and counted at the end."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, path: Path | str, reason: str) -> None:
        """Note and print one."""
        self.found.append(f"{path}: {reason}")
        print(f"\nleft out: {self.found[-1]}")

    def summary(self) -> str:
        """One line, or the first ten of them again."""
        if not self.found:
            return "nothing had to be left out"
        shown = "\n  ".join(self.found[:10])
        more = f"\n  and {len(self.found) - 10} more, named above" if len(self.found) > 10 else ""
        return f"left out {len(self.found)}:\n  {shown}{more}"


def track(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield the items under a progress bar, which writes few lines to a log file."""
    bar = ProgressBar(count, file=sys.stdout)  # its default is what that was at import
    step = 1 if sys.stdout.isatty() else max(1, count // 10)
    for number, item in enumerate(items, 1):
        yield item
        if number % step == 0 or number == count:
            bar.update(number - bar.completed)
    print()


def read_image(path: Path, flag: int, problems: Problems) -> np.ndarray | None:
    """Decode to ``[H, W, 3]`` (BGR) or ``[H, W]``, by OpenCV's flag; None if it cannot be."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        problems.add(path, error.strerror or str(error))
        return None
    image = cv2.imdecode(data, flag) if len(data) else None
    if image is None:
        problems.add(path, "not an image that can be decoded")
    return image


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, unless it is there already."""
    if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
        with write_whole(target) as partial:
            shutil.copyfile(source, partial)


def write_coco(
    path: Path, images: Iterable[tuple[dict[str, Any], list[dict]]], classes: Sequence[str]
) -> tuple[int, int]:
    """Write a COCO annotation file, whole or not at all.

    Args:
        path: the file.
        images: of each image ``file_name``, ``width`` and ``height``, and its annotations
            without their numbers, ``category_id`` from 1.
        classes: names of the categories.

    Returns:
        Numbers of images and of annotations.
    """
    kept: list[dict] = []
    annotations: list[dict] = []
    for number, (image, found) in enumerate(images, 1):
        kept.append({"id": number, **image})
        for each in found:
            numbers = {"id": len(annotations) + 1, "image_id": number}
            annotations.append({**numbers, "iscrowd": 0, **each})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": kept, "annotations": annotations, "categories": categories}
    with write_whole(path) as partial:
        partial.write_text(json.dumps(content))
    return len(kept), len(annotations)
