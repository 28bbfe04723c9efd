"""The converter of the blood cells, on a repository made on the spot."""

import json

import cv2
import numpy as np
import pytest

TOOL = "dataset_converters/bccd.py"
OBJECT = """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


def write(root, name, *objects, text=None):
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    (root / "JPEGImages" / f"{name}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    xml = "".join(OBJECT.format(*each) for each in objects)
    (root / "Annotations" / f"{name}.xml").write_text(text or f"<annotation>{xml}</annotation>")


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source" / "BCCD"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    write(root, "a", ("RBC", 1, 1, 10, 20), ("Platelets", 60, 40, 70, 50))
    write(root, "b", ("WBC", 5, 6, 30, 40))
    write(root, "c")
    for split, names in (("train", "a\nb\n"), ("val", "c\n"), ("test", "")):
        (root / f"ImageSets/Main/{split}.txt").write_text(names)
    return root.parent


def read(out, split):
    return json.loads((out / f"annotations/instances_{split}.json").read_text())


def test_boxes(run_tool, source, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = run_tool(TOOL, source, out)
    assert status == 0
    assert "2 images, 3 cells" in printed
    assert "nothing had to be left out" in printed
    train = read(out, "train")
    assert [c["name"] for c in train["categories"]] == ["RBC", "WBC", "Platelets"]
    assert [i["file_name"] for i in train["images"]] == ["a.jpg", "b.jpg"]
    assert train["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}
    found = [(a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in train["annotations"]]
    assert found == [
        (1, 1, [0, 0, 10, 20], 200),  # VOC's first pixel is 1, and the last is part of the box
        (1, 3, [59, 39, 5, 9], 45),  # cut at the border
        (2, 2, [4, 5, 26, 35], 910),
    ]
    original = source / "BCCD/JPEGImages/c.jpg"
    assert (out / "images/val/c.jpg").read_bytes() == original.read_bytes()
    assert read(out, "val")["annotations"] == []
    assert read(out, "test")["images"] == []


def test_what_is_broken_is_named_and_left_out(run_tool, source, tmp_path):
    root = source / "BCCD"
    bad = ("WBC", 5, 6, 5, 40), ("cell", 1, 1, 9, 9), ("RBC", "x", 1, 9, 9)
    write(root, "b", *bad, ("RBC", 2, 2, 9, 9))
    write(root, "d", text="<annotation><object>")
    write(root, "e")
    (root / "JPEGImages/e.jpg").write_bytes(b"no image")
    write(root, "f")
    (root / "Annotations/f.xml").unlink()
    (root / "ImageSets/Main/train.txt").write_text("b\nd\ne\nf\ng\n")
    out = tmp_path / "out"
    status, printed, _ = run_tool(TOOL, source, out)
    assert status == 0
    for found in (
        "b.xml: object 1 has a box of a line or a pixel: ['5', '6', '5', '40']",
        "b.xml: object 2 has the unknown class 'cell'",
        "b.xml: object 3 has no box: ['x', '1', '9', '9']",
        "d.xml: cannot be read: ",
        "e.jpg: not an image that can be decoded",
        "f.xml: cannot be read: ",
        "g.jpg: No such file",
        "left out 7:",
    ):
        assert found in printed
    train = read(out, "train")
    assert [image["file_name"] for image in train["images"]] == ["b.jpg"]
    assert [each["bbox"] for each in train["annotations"]] == [[1, 1, 8, 8]]
    assert sorted(path.name for path in (out / "images/train").iterdir()) == ["b.jpg"]


def test_a_lost_image_comes_back(run_tool, source, tmp_path):
    out = tmp_path / "out"
    run_tool(TOOL, source, out)
    before = read(out, "train")
    (out / "images/train/a.jpg").unlink()
    status, printed, _ = run_tool(TOOL, source, out)
    assert status == 0
    assert "nothing had to be left out" in printed
    assert (out / "images/train/a.jpg").is_file()
    assert read(out, "train") == before


def test_another_folder_is_refused(run_tool, tmp_path):
    status, _, error = run_tool(TOOL, tmp_path, tmp_path / "out")
    assert status
    assert "train.txt is missing; SOURCE must be a clone" in str(status) + error


def test_an_interruption_leaves_nothing_to_train_on(run_tool, source, tmp_path, monkeypatch):
    """Neither a part nor, over an older conversion, a mixture."""
    out = tmp_path / "out"
    run_tool(TOOL, source, out)
    before = read(out, "train")
    decode, decoded = cv2.imdecode, []

    def interrupted(*args):
        decoded.append(args)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patched:
        patched.setattr(cv2, "imdecode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_tool(TOOL, source, out)
    assert not list(out.glob("annotations/*"))
    run_tool(TOOL, source, out)
    assert read(out, "train") == before
