"""The converter of the nuclei, on a repository made on the spot."""

import json
import shutil

import cv2
import numpy as np
import pytest
from loading import load_tool
from pycocotools.coco import COCO

TOOL = "dataset_converters/nuclei.py"
VAL = load_tool(TOOL).VALIDATION.read_text().split()[0]  # before a, b and d, as it begins with 0


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


@pytest.fixture
def source(tmp_path):
    """Four images of 40x60 with two nuclei each, one of them of the validation set."""
    rng = np.random.default_rng(0)
    root = tmp_path / "source" / "stage1_train"
    for name in (VAL, "a", "b", "d"):
        write(root / name / f"images/{name}.png", rng.integers(0, 255, (40, 60, 4), np.uint8))
        for number, (top, left) in enumerate(((3, 5), (20, 30))):
            mask = np.zeros((40, 60), np.uint8)
            mask[top : top + 8, left : left + 12] = 255
            write(root / name / f"masks/{number}.png", mask)
    return root.parent


def convert(run_tool, source, out):
    status, printed, error = run_tool(TOOL, source, out)
    assert status == 0, error
    return printed


def test_instances_and_masks(run_tool, source, tmp_path):
    out = tmp_path / "out"
    printed = convert(run_tool, source, out)
    assert "3 images, 6 nuclei" in printed
    assert "1 images, 2 nuclei" in printed
    names = load_tool(TOOL).VALIDATION.read_text().split()
    for name in names[1:]:
        assert f"stage1_train/{name}: missing, an image of the validation set" in printed
    assert "4 images where the repository has 664" in printed
    assert "left out 133:" in printed
    coco = COCO(str(out / "annotations/instances_val.json"))
    (image,) = coco.imgs.values()
    assert image == {"id": 1, "file_name": f"{VAL}.png", "width": 60, "height": 40}
    first, second = coco.anns.values()
    assert first["bbox"] == [5, 3, 12, 8]
    assert first["area"] == 96
    assert first["iscrowd"] == 0
    both = coco.annToMask(first) + coco.annToMask(second)
    index = cv2.imread(str(out / f"masks/val/{VAL}.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(index, both)
    original = source / f"stage1_train/{VAL}/images/{VAL}.png"
    assert (out / f"images/val/{VAL}.png").read_bytes() == original.read_bytes()
    assert sorted(p.name for p in (out / "images/train").iterdir()) == ["a.png", "b.png", "d.png"]


def test_mmdetection_reads_them(run_tool, source, tmp_path):
    from mmdet.datasets import CocoDataset

    out = tmp_path / "out"
    convert(run_tool, source, out)
    data = CocoDataset(
        ann_file="annotations/instances_train.json",
        data_root=str(out),
        data_prefix=dict(img="images/train"),
        metainfo=dict(classes=("nucleus",)),
        pipeline=[
            dict(type="mmdet.LoadImageFromFile"),
            dict(type="mmdet.LoadAnnotations", with_bbox=True, with_mask=True),
        ],
    )
    assert len(data) == 3
    sample = data[0]
    assert sample["img"].shape == (40, 60, 3)
    assert sample["gt_masks"].masks.sum() == 2 * 96
    assert sample["gt_bboxes"].tensor.tolist() == [[5, 3, 17, 11], [30, 20, 42, 28]]


def test_what_is_broken_is_named_and_left_out(run_tool, source, tmp_path):
    root = source / "stage1_train"
    (root / "a/images/a.png").write_bytes(b"no image")
    (root / "b/images/b.png").unlink()
    write(root / VAL / "masks/2.png", np.zeros((40, 60), np.uint8))
    for name in ("c", "e", "f"):
        shutil.copytree(root / "d", root / name)
        (root / name / "images/d.png").rename(root / name / f"images/{name}.png")
    write(root / "c/masks/3.png", np.ones((30, 60), np.uint8))
    (root / "e/masks/4.png").write_bytes(b"")
    deep = np.zeros((40, 60), np.uint16)
    deep[:2] = 1  # with 8 bits nothing would be left
    write(root / "f/masks/5.png", deep)
    for mask in (root / "d/masks").iterdir():
        mask.unlink()
    out = tmp_path / "out"
    printed = convert(run_tool, source, out)
    for found in (
        "a/images/a.png: not an image that can be decoded",
        "b/images/b.png: No such file",
        f"{VAL}/masks/2.png: an empty mask",
        "c/masks/3.png: 30x60, its image 40x60",
        "e/masks/4.png: not an image that can be decoded",
        "d/masks: no mask of a nucleus",
        "left out 139:",  # those 6, 132 that the validation set has, and their number
    ):
        assert found in printed
    train, val = (
        json.loads((out / f"annotations/instances_{s}.json").read_text()) for s in ("train", "val")
    )
    # An image whose nuclei are not all known would teach that they are background.
    assert [image["file_name"] for image in train["images"]] == ["f.png"]
    assert [path.name for path in (out / "masks/train").iterdir()] == ["f.png"]
    assert len(train["annotations"]) == 3
    assert len(val["annotations"]) == 2
    again = convert(run_tool, source, out)  # what had a problem is named again
    assert "left out 139:" in again


def test_resumes(run_tool, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    decode, decoded = cv2.imdecode, []

    def interrupted(*args):
        decoded.append(args)
        if len(decoded) == 10:  # the image of d, the last folder
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(cv2, "imdecode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tool(TOOL, source, out)
    assert not (out / "annotations").exists()
    assert "3 images, 6 nuclei" in convert(run_tool, source, out)
    assert len(decoded) == 10 + 3
    lost = [out / "images/train/a.png", out / "masks/train/b.png"]
    for path in lost:
        path.unlink()
    convert(run_tool, source, out)
    assert all(path.is_file() for path in lost)
    assert len(decoded) == 10 + 3 + 2 * 3


def test_another_folder_is_refused(run_tool, tmp_path):
    status, _, error = run_tool(TOOL, tmp_path, tmp_path / "out")
    assert status
    assert "stage1_train has no images; SOURCE must be a clone" in str(status) + error


def test_published_validation_set():
    names = load_tool(TOOL).VALIDATION.read_text().split()
    assert len(names) == len(set(names)) == 133
    assert names == sorted(names)
    assert all(len(name) == 64 for name in names)
