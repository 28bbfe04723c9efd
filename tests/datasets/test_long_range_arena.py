"""The data sets of the Long Range Arena, on small files in the formats as distributed."""

import io
import pickle

import cv2
import numpy as np
import pytest
import torch
from lra_data import WRITERS, write_aan, write_cifar, write_imdb, write_listops, write_pathfinder

from mmsoft.datasets import AANRetrieval, GreyCIFAR10, IMDbBytes, ListOps, Pathfinder32
from mmsoft.models import SequencePreprocessor
from mmsoft.registry import DATASETS

SETS = dict(
    listops=ListOps,
    text=IMDbBytes,
    retrieval=AANRetrieval,
    image=GreyCIFAR10,
    pathfinder32=Pathfinder32,
)


def text_of(tokens):
    return bytes((tokens - 1).tolist())


def test_listops(tmp_path):
    data = ListOps(write_listops(tmp_path / "d"), "train")
    assert len(data) == 9
    assert data[3]["gt_label"] == 3
    # digits are 1 to 10, MIN, MAX, MED, SM 11 to 14, the closing bracket 15
    assert data[3]["tokens"].tolist() == [12, 4, 14, 2, 10, 15, 15]
    assert data[8]["tokens"].tolist() == [13, 4, 5, 11, 8, 15, 15]
    assert len(ListOps(tmp_path / "d", "test", max_length=7)) == 9
    message = r"basic_test\.tsv, line 2: 7 tokens, more than max_length 6; use the config of such"
    with pytest.raises(ValueError, match=message):
        ListOps(tmp_path / "d", "test", max_length=6)
    assert len(ListOps(tmp_path / "d", "test", indices=4)) == 4


def test_imdb(tmp_path):
    data = IMDbBytes(write_imdb(tmp_path / "d"), "train")
    assert [data[i]["gt_label"] for i in range(8)] == [0] * 4 + [1] * 4
    assert text_of(data[5]["tokens"]) == b"So fine, and on <br />\xc3\xa9"
    assert len(IMDbBytes(tmp_path / "d", "test", max_length=7)[5]["tokens"]) == 7
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'val'"):
        IMDbBytes(tmp_path / "d", "val")


def test_aan(tmp_path):
    data = AANRetrieval(write_aan(tmp_path / "d"), "val")
    assert [data[i]["gt_label"] for i in range(8)] == [0, 1] * 4
    first, second = data[3]["tokens"]
    assert text_of(first[first > 0]) == b"short 3"
    assert text_of(second) == b"much longer text text text "
    assert data[3]["tokens"].shape == (2, len(second))
    assert AANRetrieval(tmp_path / "d", "test", max_length=5)[3]["tokens"].shape == (2, 5)


def test_cifar(tmp_path):
    train = GreyCIFAR10(write_cifar(tmp_path / "d"), "train")
    val = GreyCIFAR10(tmp_path / "d", "val")
    assert [len(train), len(val)] == [27, 3]  # as published 45 000 and 5 000
    last = np.fromfile(tmp_path / "d/data_batch_5.bin", np.uint8)[::3073][3:]
    assert [val[i]["gt_label"] for i in range(3)] == last.tolist()
    record = np.fromfile(tmp_path / "d/data_batch_2.bin", np.uint8)[3073:6146]
    red, green, blue = record[1:].reshape(3, 1024).astype(float)
    sample = train[7]
    assert sample["gt_label"] == record[0]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(sample["tokens"] - 1, grey, atol=0.5001)
    assert GreyCIFAR10(tmp_path / "d", "test")[0]["gt_label"] < 10


def test_pathfinder(tmp_path):
    data = Pathfinder32(write_pathfinder(tmp_path / "d"), "val")
    with np.load(tmp_path / "d/pathfinder32_val.npz") as file:
        assert (data[4]["tokens"] - 1).tolist() == file["images"][4].flatten().tolist()
        assert [data[i]["gt_label"] for i in range(6)] == file["labels"].tolist()


def write_distributed(root, pictures=15):
    """Text in files of metadata, 10 lines each, pictures, and an empty one."""
    (root / "metadata").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (pictures, 32, 32), np.uint8)
    for number, image in enumerate(images):
        batch = f"{9 + number // 10}"
        (root / "imgs" / batch).mkdir(parents=True, exist_ok=True)
        file = root / f"imgs/{batch}/sample_{number}.png"
        cv2.imwrite(str(file), image)
        with (root / f"metadata/{batch}.npy").open("a") as metadata:
            metadata.write(f"imgs/{batch} {file.name} {number} {number % 2} 1.0 14 4 2 0.5 1 1\n")
    (root / "imgs/9/sample_3.png").write_bytes(b"")
    return np.delete(images, 3, 0), [n % 2 for n in range(pictures) if n != 3]


def test_pathfinder_as_distributed(tmp_path):
    root = tmp_path / "curv_contour_length_14"
    images, labels = write_distributed(root)
    splits = [Pathfinder32(root, split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [11, 1, 2]
    found = [split[i] for split in splits for i in range(len(split))]
    assert [sample["gt_label"] for sample in found] == labels
    for sample, image in zip(found, images):
        assert (sample["tokens"] - 1).tolist() == image.flatten().tolist()
    (root / "imgs/9/sample_1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"sample_1\.png is not a picture of 32x32 pixels"):
        splits[0][1]
    (root / "imgs/9/sample_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"sample_1\.png is missing: Pathfinder32 expects"):
        Pathfinder32(root, "val")
    np.save(root / "metadata/9.npy", np.array([Evil()], object))
    with pytest.raises(ValueError, match=r"9\.npy, line 1: not a folder, a file, a number and a l"):
        Pathfinder32(root, "val")


@pytest.mark.parametrize("name", SETS)
def test_samples_pass_mmpretrains_pipeline_and_become_a_batch(name, tmp_path):
    pytest.importorskip("mmpretrain.datasets", exc_type=(ImportError, RuntimeError))
    root = WRITERS[name](tmp_path / "d")
    pipeline = [dict(type="mmpretrain.PackInputs", input_key="tokens")]
    config = dict(type=f"mmsoft.{SETS[name].__name__}", data_root=str(root), split="train")
    data = DATASETS.build(dict(config, pipeline=pipeline))
    samples = [data[i] for i in (0, 3, 5)]
    batch = SequencePreprocessor()(
        {key: [sample[key] for sample in samples] for key in ("inputs", "data_samples")}
    )
    longest = max(sample["inputs"].shape[-1] for sample in samples)
    assert batch["inputs"].dtype == torch.int64
    assert batch["inputs"].shape == (3, *[2] * (name == "retrieval"), longest)
    for row, sample in zip(batch["inputs"], samples):
        length = sample["inputs"].shape[-1]
        assert torch.equal(row[..., :length], sample["inputs"])
        assert not row[..., length:].any()
    assert all(sample.gt_label.numel() == 1 for sample in batch["data_samples"])


@pytest.mark.parametrize("name", SETS)
def test_a_missing_file_is_named_with_what_is_expected(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        SETS[name](tmp_path / "none", "test")
    message = str(caught.value)
    assert str(tmp_path / "none") in message
    assert SETS[name].files in message


def break_listops(root, line):
    path = root / "basic_test.tsv"
    path.write_text(path.read_text() + line + "\n")


@pytest.mark.parametrize(
    "line",
    [
        "( ( [MIN 1 ) ] )",
        "( ( [SUM 1 ) ] )\t1",
        "( ( [MIN 1 ) ] )\t10",
        "\t3",
        "( [MIN A ) ] )\t1",
        "( \x01 1 ) ] )\t1",
        "( ( [MIN 12 ) ] )\t1",  # no blank between two digits
        "( ( [MIN[MAX 1 ) ] ] )\t1",
        "( [MIN 1 )\t1",  # does not end
        "] ] 3\t9",
        "( [MIN 1 ) ] ]\t1",
        "( [MIN 1 ) ] 2\t1",  # two expressions
        "1 2\t1",
        "( [MIN 1 ) ( [MAX ] ) ]\t1",  # an empty list
        "",
    ],
)
def test_malformed_listops(line, tmp_path):
    root = write_listops(tmp_path / "d")
    break_listops(root, line)
    with pytest.raises(ValueError, match=r"basic_test.tsv, line 11: not an expression of 0 1 2"):
        ListOps(root, "test")
    (root / "basic_val.tsv").write_text("0\t1\n")
    with pytest.raises(ValueError, match=r"basic_val\.tsv must begin with Source and Target"):
        ListOps(root, "val")


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_below_one_is_refused(length, tmp_path):
    with pytest.raises(ValueError, match=f"max_length must be at least 1, or None, got {length}"):
        IMDbBytes(write_imdb(tmp_path / "d"), "train", max_length=length)


@pytest.mark.parametrize("line", ["1\t2\t3\ttext", "2\t1\t2\ta\tb", "1\t1\t2\t\tb", ""])
def test_malformed_aan(line, tmp_path):
    root = write_aan(tmp_path / "d")
    path = root / "new_aan_pairs.eval.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"eval.tsv, line 9: not a label \(0 or 1\), two numbers"):
        AANRetrieval(root, "val")


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: b"", lambda d: b"\x0a" + d[1:]])
def test_malformed_cifar(change, tmp_path):
    path = write_cifar(tmp_path / "d") / "test_batch.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"test_batch.bin must hold records of a class"):
        GreyCIFAR10(tmp_path / "d", "test")


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_malformed_pathfinder(tmp_path, capsys):
    root = write_pathfinder(tmp_path / "d")
    path = root / "pathfinder32_test.npz"
    whole = path.read_bytes()
    objects = np.array([Evil()], object)
    array = io.BytesIO()
    np.save(array, np.zeros((2, 32, 32)))
    broken = (b"", whole[:-50], b"PK" + whole[2:50], pickle.dumps(Evil()), array.getvalue())
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test.npz is not from make_pathfinder.py"):
            Pathfinder32(root, "test")
    for images, labels in (
        (np.zeros((2, 32, 31), np.uint8), np.zeros(2)),
        (np.zeros((2, 32, 32)), np.zeros(2)),
        (np.zeros((2, 32, 32), np.uint8), np.array([0, 2])),
        (np.zeros((2, 32, 32), np.uint8), np.zeros(3)),
    ):
        np.savez(path, images=images, labels=labels)
        with pytest.raises(ValueError, match=r"test.npz must have images"):
            Pathfinder32(root, "test")
    np.savez(path, images=objects, labels=objects)
    with pytest.raises(ValueError, match="not from make_pathfinder"):
        Pathfinder32(root, "test")
    assert "code ran" not in capsys.readouterr().out


def no_lines(root):
    (root / "basic_test.tsv").write_text("Source\tTarget\n")


def no_pairs(root):
    (root / "new_aan_pairs.test.tsv").write_bytes(b"")


def no_pictures(root):
    empty = np.zeros((0, 32, 32), np.uint8)
    np.savez(root / "pathfinder32_test.npz", images=empty, labels=np.zeros(0))


def no_metadata(root):
    (root / "metadata").mkdir()


def no_entries(root):
    no_metadata(root)
    (root / "metadata/0.npy").write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("listops", no_lines),
        ("retrieval", no_pairs),
        ("pathfinder32", no_pictures),
        ("pathfinder32", no_metadata),
        ("pathfinder32", no_entries),
    ],
)
def test_a_split_without_samples_is_named_with_what_is_expected(name, empty, tmp_path):
    """As after an interrupted download."""
    root = WRITERS[name](tmp_path / "d")
    empty(root)
    with pytest.raises(ValueError, match="has no sample of the split 'test'") as caught:
        SETS[name](root, "test")
    assert str(root) in str(caught.value)
    assert SETS[name].files in str(caught.value)


def test_an_empty_review_is_named(tmp_path):
    root = write_imdb(tmp_path / "d")
    (root / "train/pos/1_7.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1_7.txt is empty"):
        IMDbBytes(root, "train")


def test_the_preprocessor_has_no_augmentation():
    with pytest.raises(ValueError, match="batch_augments must be None for sequences"):
        SequencePreprocessor(batch_augments=dict(augments="Mixup"))
