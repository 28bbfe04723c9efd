"""The converter of the nuclei, on a repository made on the spot."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from loading import load_tool
from pycocotools.coco import COCO

TOOL = "dataset_converters/nuclei.py"
CONFIG = Path(__file__).parents[2] / "configs/nuclei/upernet_softpp-mini_nuclei.py"
KNOWN = load_tool(TOOL).published()
VAL = next(name for name, of in KNOWN.items() if of == (3, "val"))  # between a and b


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


@pytest.fixture
def source(tmp_path):
    """Four images of 40x60 with three nuclei each, one of them of the validation set."""
    rng = np.random.default_rng(0)
    root = tmp_path / "source" / "stage1_train"
    for name in (VAL, "a", "b", "d"):
        write(root / name / f"images/{name}.png", rng.integers(0, 255, (40, 60, 4), np.uint8))
        for number, (top, left) in enumerate(((3, 5), (20, 30), (31, 5))):
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
    assert "3 images, 9 nuclei" in printed
    assert "1 images, 3 nuclei" in printed
    for name, of in KNOWN.items():
        there = f"stage1_train/{name}: missing, an image of the {of.split} set" in printed
        assert there == (name != VAL)
    assert "left out 663:" in printed
    assert "not of the repository, in the training set: a, b, d\n" in printed
    coco = COCO(str(out / "annotations/instances_val.json"))
    (image,) = coco.imgs.values()
    assert image == {"id": 1, "file_name": f"{VAL}.png", "width": 60, "height": 40}
    first, second, third = coco.anns.values()
    assert first["bbox"] == [5, 3, 12, 8]
    assert first["area"] == 96
    assert first["iscrowd"] == 0
    every = sum(map(coco.annToMask, (first, second, third)))
    index = cv2.imread(str(out / f"masks/val/{VAL}.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(index, every)
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
    assert sample["gt_masks"].masks.sum() == 3 * 96
    assert sample["gt_bboxes"].tensor.tolist() == [
        [5, 3, 17, 11],
        [30, 20, 42, 28],
        [5, 31, 17, 39],
    ]


def test_what_is_broken_is_named_and_left_out(run_tool, source, tmp_path):
    root = source / "stage1_train"
    (root / "a/images/a.png").write_bytes(b"no image")
    (root / "b/images/b.png").unlink()
    write(root / VAL / "masks/3.png", np.zeros((40, 60), np.uint8))
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
        f"{VAL}/masks/3.png: an empty mask",
        "c/masks/3.png: 30x60, its image 40x60",
        "e/masks/4.png: not an image that can be decoded",
        "d/masks: no mask of a nucleus",
        "left out 669:",  # those 6, and those of the repository that are not there
    ):
        assert found in printed
    train, val = (
        json.loads((out / f"annotations/instances_{s}.json").read_text()) for s in ("train", "val")
    )
    # An image whose nuclei are not all known would teach that they are background.
    assert [image["file_name"] for image in train["images"]] == ["f.png"]
    assert [path.name for path in (out / "masks/train").iterdir()] == ["f.png"]
    assert len(train["annotations"]) == 4
    assert len(val["annotations"]) == 3
    again = convert(run_tool, source, out)  # what had a problem is named again
    assert "left out 669:" in again


def test_resumes(run_tool, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    decode, decoded = cv2.imdecode, []

    def interrupted(*args):
        decoded.append(args)
        if len(decoded) == 13:  # the image of d, the last folder
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(cv2, "imdecode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tool(TOOL, source, out)
    assert not (out / "annotations").exists()
    assert "3 images, 9 nuclei" in convert(run_tool, source, out)
    assert len(decoded) == 13 + 4
    lost = [out / "images/train/a.png", out / "masks/train/b.png"]
    for path in lost:
        path.unlink()
    convert(run_tool, source, out)
    assert all(path.is_file() for path in lost)
    assert len(decoded) == 13 + 4 + 2 * 4


def test_another_folder_is_refused(run_tool, tmp_path):
    status, _, error = run_tool(TOOL, tmp_path, tmp_path / "out")
    assert status
    assert "stage1_train has no images; SOURCE must be a clone" in str(status) + error


def test_a_lost_mask_is_named_and_its_image_left_out(run_tool, source, tmp_path):
    """Its nucleus would be background."""
    name = next(name for name, of in KNOWN.items() if of == (4, "train"))
    root = source / "stage1_train"
    shutil.copytree(root / "d", root / name)
    (root / name / "images/d.png").rename(root / name / f"images/{name}.png")
    out = tmp_path / "out"
    printed = convert(run_tool, source, out)
    assert f"{name}/masks: 3 masks where the repository has 4" in printed
    assert (out / "train.txt").read_text().split() == ["a", "b", "d"]
    shutil.copy(root / name / "masks/0.png", root / name / "masks/3.png")
    convert(run_tool, source, out)
    assert (out / "train.txt").read_text().split() == sorted([name, "a", "b", "d"])


def test_a_changed_source_is_converted_again(run_tool, source, tmp_path):
    def uncompressed(value):  # of the same length
        image = np.full((40, 60, 3), value, np.uint8)
        return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()

    out, path = tmp_path / "out", source / "stage1_train/a/images/a.png"
    path.write_bytes(uncompressed(value=1))
    convert(run_tool, source, out)
    mask = np.zeros((40, 60), np.uint8)
    mask[30:33, :4] = 255
    write(source / "stage1_train/a/masks/9.png", mask)  # as corrections of the repository come
    path.write_bytes(uncompressed(value=2))
    assert "3 images, 10 nuclei" in convert(run_tool, source, out)
    assert (out / "images/train/a.png").read_bytes() == uncompressed(value=2)
    assert cv2.imread(str(out / "masks/train/a.png"), cv2.IMREAD_UNCHANGED)[31, 2] == 1


def test_segmentation_reads_what_the_lists_name(run_tool, source, tmp_path, monkeypatch):
    """Nothing of an unfinished conversion, nor what was left out since."""
    from mmengine.config import Config
    from mmseg.datasets import BaseSegDataset

    out = tmp_path / "out"
    config = Config.fromfile(CONFIG, import_custom_modules=False).train_dataloader.dataset
    config = {**config, "data_root": str(out), "pipeline": []}
    assert config.pop("type") == "BaseSegDataset"
    config.pop("_scope_", None)
    convert(run_tool, source, out)
    (source / "stage1_train/b/images/b.png").write_bytes(b"")
    convert(run_tool, source, out)
    read = [Path(info["img_path"]).name for info in BaseSegDataset(**config)]
    assert read == ["a.png", "d.png"]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cv2, "imdecode", interrupted)
    # A fresh folder, and a complete one whose source has changed since.
    write(source / "stage1_train/a/masks/9.png", np.ones((40, 60), np.uint8))
    for begun in (out, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            run_tool(TOOL, source, begun)
        assert not list(begun.glob("annotations/*"))
    for unfinished in (out, tmp_path / "other"):
        with pytest.raises(AssertionError, match="Failed to load `ann_file`"):
            BaseSegDataset(**{**config, "data_root": str(unfinished)})


def test_published_images():
    """The third and every fifth of each size is for validation: sizes are those of the archive."""
    assert len(KNOWN) == 664
    assert sum(of.split == "val" for of in KNOWN.values()) == 133
    assert sum(of.masks for of in KNOWN.values()) == 28_986
    assert list(KNOWN) == sorted(KNOWN)
    assert all(len(name) == 64 for name in KNOWN)
