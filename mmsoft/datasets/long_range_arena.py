"""The tasks of the Long Range Arena (arXiv 2011.04006), from the files as they are distributed.

Nothing is unpickled. Of every task token 0 is padding; bytes and pixels are their value plus 1.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from mmengine.dataset import BaseDataset

from mmsoft.registry import DATASETS

SPLITS = ("train", "val", "test")


class SequenceDataset(BaseDataset):
    """Sequences of tokens with one class each.

    Args:
        data_root: folder of the files.
        split: ``'train'``, ``'val'`` or ``'test'``.
        max_length: tokens after which a sequence is cut off; ``None`` for the task's.
        pipeline: transforms; what comes in has ``tokens`` (int64 ``[N]``) and ``gt_label``.
        indices: how many of the first samples to use, or which; ``None`` for all.

    Raises:
        FileNotFoundError: a file is missing; the message says what is expected where.
        ValueError: a file is malformed, and the message says where; or an argument is invalid.
    """

    length = 1024
    splits: tuple[str, ...] = SPLITS
    files = ""  # what is expected in the folder

    def __init__(
        self,
        data_root: str,
        split: str,
        max_length: int | None = None,
        pipeline: Sequence[dict | Callable] = (),
        indices: Any = None,
    ):
        if split not in self.splits:
            raise ValueError(f"split must be one of {self.splits}, got {split!r}")
        self.split = split
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, or None, got {max_length}")
        self.max_length = self.length if max_length is None else max_length
        super().__init__(data_root=data_root, pipeline=list(pipeline), indices=indices)

    def path(self, name: str) -> Path:
        """A file or folder of the data set.

        Raises:
            FileNotFoundError: it is not there.
        """
        path = Path(self.data_root) / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {type(self).__name__} expects in {self.data_root} {self.files}"
            )
        return path

    def load_data_list(self) -> list[dict[str, Any]]:
        """All samples of the split.

        Raises:
            ValueError: there is none.
        """
        if samples := self.read():
            return samples
        raise ValueError(
            f"{self.data_root} has no sample of the split {self.split!r}: {type(self).__name__} "
            f"expects there {self.files}"
        )

    def read(self) -> list[dict[str, Any]]:
        """One dict for each sample, with what :meth:`tokens` needs and ``gt_label``."""
        raise NotImplementedError

    def tokens(self, sample: dict[str, Any]) -> np.ndarray:
        """The tokens of a sample, ``[N]`` or ``[2, N]``, not yet cut off."""
        return sample["tokens"]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """``tokens``, ``gt_label`` and ``sample_idx`` of one sample."""
        sample = super().get_data_info(idx)
        tokens = torch.from_numpy(self.tokens(sample)[..., : self.max_length].astype(np.int64))
        return dict(tokens=tokens, gt_label=sample["gt_label"], sample_idx=sample["sample_idx"])


OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
LISTOPS_TOKENS = (*map(str, range(10)), *OPERATORS, "]")  # token n + 1


# A control character for each operator; then the token of each character, 0 between tokens.
_MARKS = [(name.encode(), bytes([i])) for i, name in enumerate(OPERATORS, 1)]
_INVALID = 255
_TOKENS = np.full(256, _INVALID, np.uint8)
_TOKENS[[*b"0123456789", *range(1, 5), *b"]"]] = range(1, 16)
_TOKENS[list(b"() ")] = 0
_DEPTH = np.zeros(16, np.int8)  # what a token adds: lists begin at 11 to 14 and end at 15
_DEPTH[11:15], _DEPTH[15] = 1, -1


def _listops_tokens(source: bytes) -> np.ndarray | None:
    """The tokens of a digit or of a list of lists and digits, none empty; ``None`` of all else.

    Round parentheses count as blanks.
    """
    if not source or np.frombuffer(source, np.uint8).min() < 32:
        return None
    for name, mark in _MARKS:
        source = source.replace(name, mark)
    codes = _TOKENS[np.frombuffer(source, np.uint8)]
    there = codes != 0
    tokens = codes[there]
    if not len(tokens) or _INVALID in tokens or (there[1:] & there[:-1]).any():
        return None
    step = _DEPTH[tokens]
    depth = np.cumsum(step, dtype=np.int64)
    empty = (step[:-1] - step[1:] == 2).any()  # a list that ends where it begins
    return tokens if depth[-1] == 0 and (depth[:-1] > 0).all() and not empty else None


@DATASETS.register_module()
class ListOps(SequenceDataset):
    """Nested lists of operations on digits; the class is the value.

    ``basic_{train,val,test}.tsv``, from ``tools/dataset_converters/make_listops.py`` or as
    distributed: columns ``Source``, ``Target``. Round parentheses do not count. An expression of
    more than ``max_length`` tokens, which would lose its end and so its value, is an error.
    """

    METAINFO: ClassVar[dict] = dict(classes=tuple(map(str, range(10))))
    length = 2000
    files = (
        "basic_train.tsv, basic_val.tsv and basic_test.tsv; "
        "python tools/dataset_converters/make_listops.py writes them"
    )

    def read(self) -> list[dict[str, Any]]:
        """Read the file of the split."""
        path = self.path(f"basic_{self.split}.tsv")
        samples = []
        with path.open("rb") as file:
            if (header := file.readline().split()) != [b"Source", b"Target"]:
                raise ValueError(f"{path} must begin with Source and Target, got {header[:3]}")
            for number, line in enumerate(file, 2):
                source, _, target = line.rstrip(b"\r\n").rpartition(b"\t")
                tokens = _listops_tokens(source)
                if tokens is None or len(target) != 1 or not target.isdigit():
                    raise ValueError(
                        f"{path}, line {number}: not an expression of {' '.join(LISTOPS_TOKENS)}, "
                        "a tab and a digit"
                    )
                if len(tokens) > self.max_length:
                    raise ValueError(
                        f"{path}, line {number}: {len(tokens)} tokens, more than max_length "
                        f"{self.max_length}; use the config of such lengths (softpp_listops.py: "
                        "2000), or name a folder of shorter expressions as data_root"
                    )
                samples.append(dict(tokens=tokens, gt_label=int(target)))
        return samples


@DATASETS.register_module()
class IMDbBytes(SequenceDataset):
    """Reviews of films as bytes; the class is whether they praise.

    The folder ``aclImdb`` as distributed (``{train,test}/{neg,pos}/*.txt``).
    """

    METAINFO: ClassVar[dict] = dict(classes=("neg", "pos"))
    length = 4000
    splits = ("train", "test")
    files = "the folders train/neg, train/pos, test/neg and test/pos of aclImdb, with .txt files"

    def read(self) -> list[dict[str, Any]]:
        """Read all reviews of the split, in the order of their names."""
        samples = []
        for label, name in enumerate(("neg", "pos")):
            folder = self.path(f"{self.split}/{name}")
            paths = sorted(folder.glob("*.txt"))
            if not paths:
                raise FileNotFoundError(f"{folder} has no .txt files: expected {self.files}")
            for path in paths:
                if not (text := path.read_bytes()[: self.max_length]):
                    raise ValueError(f"{path} is empty")
                samples.append(dict(tokens=_bytes(text), gt_label=label))
        return samples


@DATASETS.register_module()
class AANRetrieval(SequenceDataset):
    """Pairs of papers as bytes; the class is whether one cites the other.

    ``new_aan_pairs.{train,eval,test}.tsv`` as distributed, without a header: label, two numbers of
    papers, two texts. A text is read when it is needed. ``tokens`` are ``[2, N]``.
    """

    METAINFO: ClassVar[dict] = dict(classes=("unrelated", "related"))
    length = 4000
    files = "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv"

    def read(self) -> list[dict[str, Any]]:
        """Find the lines of the split's file."""
        name = "eval" if self.split == "val" else self.split
        self.file = self.path(f"new_aan_pairs.{name}.tsv")
        samples, offset = [], 0
        with self.file.open("rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                label = fields[0].strip(b'"')
                valid = len(fields) == 5 and fields[3] and fields[4]
                if not valid or label not in (b"0", b"1", b"0.0", b"1.0"):
                    raise ValueError(
                        f"{self.file}, line {number}: not a label (0 or 1), two numbers and two "
                        "texts with tabs between them"
                    )
                where = dict(offset=offset, size=len(line))
                samples.append(dict(where, gt_label=int(label[:1])))
                offset += len(line)
        return samples

    def tokens(self, sample: dict[str, Any]) -> np.ndarray:
        """Both texts, the shorter one filled up with padding."""
        with self.file.open("rb") as file:
            file.seek(sample["offset"])
            line = file.read(sample["size"]).rstrip(b"\r\n")
        texts = [_bytes(text[: self.max_length]) for text in line.split(b"\t")[3:5]]
        tokens = np.zeros((2, max(map(len, texts))), np.int16)
        for target, text in zip(tokens, texts):
            target[: len(text)] = text
        return tokens


CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)


@DATASETS.register_module()
class GreyCIFAR10(SequenceDataset):
    """CIFAR-10 in grey, pixel by pixel, row by row.

    The binary version as distributed, ``data_batch_{1..5}.bin`` and ``test_batch.bin``. The last
    tenth of the five batches is for validation.
    """

    METAINFO: ClassVar[dict] = dict(classes=CIFAR10)
    files = "data_batch_1.bin to data_batch_5.bin and test_batch.bin of the binary version"

    def read(self) -> list[dict[str, Any]]:
        """Read the batches of the split."""
        names = [f"data_batch_{number}.bin" for number in range(1, 6)]
        if self.split == "test":
            names = ["test_batch.bin"]
        samples = []
        for name in names:
            path = self.path(name)
            data = np.fromfile(path, np.uint8)
            if not len(data) or len(data) % 3073 or data[::3073].max() > 9:
                raise ValueError(f"{path} must hold records of a class (0 to 9) and 3072 bytes")
            records = data.reshape(-1, 3073)
            # The weights of ITU-R 601, as whoever converts to grey uses.
            planes = records[:, 1:].reshape(-1, 3, 1024)
            weights = np.array([0.299, 0.587, 0.114], np.float32)
            grey = np.rint(weights @ planes.astype(np.float32))
            pixels = grey.astype(np.int16) + 1
            samples += [
                dict(tokens=image, gt_label=int(label))
                for image, label in zip(pixels, records[:, 0])
            ]
        cut = len(samples) * 9 // 10
        return dict(train=samples[:cut], val=samples[cut:], test=samples)[self.split]


@DATASETS.register_module()
class Pathfinder32(SequenceDataset):
    """Two discs in a picture of dashes, pixel by pixel; the class is whether a path joins them.

    ``pathfinder32_{train,val,test}.npz`` from ``tools/dataset_converters/make_pathfinder.py``:
    ``images``, uint8 ``[n, 32, 32]``, and ``labels``, ``[n]``. Or the folder
    ``curv_contour_length_14`` as distributed, with ``imgs`` and ``metadata``: 80, 10 and 10 % of
    its pictures in the order of their numbers; those that are empty files are left out.
    """

    METAINFO: ClassVar[dict] = dict(classes=("apart", "joined"))
    files = (
        "pathfinder32_train.npz, pathfinder32_val.npz and pathfinder32_test.npz; "
        "python tools/dataset_converters/make_pathfinder.py writes them; or metadata/*.npy and "
        "imgs/ of curv_contour_length_14 as distributed"
    )

    def read(self) -> list[dict[str, Any]]:
        """Read the split's file, whose pictures stay in one array, or find single pictures."""
        if (Path(self.data_root) / "metadata").is_dir():
            return self._distributed()
        path = self.path(f"pathfinder32_{self.split}.npz")
        try:
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            with file:
                images, labels = file["images"], file["labels"]
        except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not from make_pathfinder.py: {error}") from None
        shape = (len(labels), 32, 32)
        if (
            images.shape != shape
            or images.dtype != np.uint8
            or not set(np.unique(labels)) <= {0, 1}
        ):
            raise ValueError(f"{path} must have images, uint8 [n, 32, 32], and labels, 0 or 1")
        self.images = images.reshape(-1, 1024)
        return [dict(number=i, gt_label=int(label)) for i, label in enumerate(labels)]

    def _distributed(self) -> list[dict[str, Any]]:
        samples = []
        # Text, whatever the suffix says.
        files = (Path(self.data_root) / "metadata").glob("*.npy")
        for path in sorted(files, key=lambda path: (len(path.stem), path.stem)):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                fields = line.decode(errors="replace").split()
                if len(fields) < 4 or fields[3] not in ("0", "1"):
                    raise ValueError(
                        f"{path}, line {number}: not a folder, a file, a number and a label (0 or "
                        "1) with blanks between them"
                    )
                picture = self.path(f"{fields[0]}/{fields[1]}")
                if picture.stat().st_size:
                    samples.append(dict(file=str(picture), gt_label=int(fields[3])))
        first, end = dict(train=(0, 8), val=(8, 9), test=(9, 10))[self.split]
        return samples[len(samples) * first // 10 : len(samples) * end // 10]

    def tokens(self, sample: dict[str, Any]) -> np.ndarray:
        """The pixels of the picture."""
        if "file" in sample:
            data = np.fromfile(sample["file"], np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
            if image is None or image.shape != (32, 32):
                raise ValueError(f"{sample['file']} is not a picture of 32x32 pixels")
            return image.flatten().astype(np.int16) + 1
        return self.images[sample["number"]].astype(np.int16) + 1


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.int16) + 1
