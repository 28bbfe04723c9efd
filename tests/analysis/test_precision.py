"""Average precision on parts of a data set, beside COCO's own of each part."""

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.mask import encode

from mmsoft.analysis import average_precisions, by_side

SIDE = {1: 20, 2: 20, 3: 60, 4: 200}


def mask(box, side):
    x, y, w, h = box
    pixels = np.zeros((side, side), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    return encode(pixels)


def boxes(image):
    """Four objects a side of 20."""
    return [(5 * n, 3, 4, 6) for n in range(SIDE[image] // 5)]


@pytest.fixture
def truth():
    annotations = [
        dict(image_id=image, category_id=7 if n % 2 else 3, bbox=list(box), area=24, iscrowd=0)
        | dict(segmentation=mask(box, SIDE[image]))
        for image in (1, 2, 3)
        for n, box in enumerate(boxes(image))
    ]
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=image, height=side, width=side) for image, side in SIDE.items()],
        annotations=[dict(id=n, **one) for n, one in enumerate(annotations, 1)],
        categories=[dict(id=3, name="even"), dict(id=7, name="odd")],
    )
    coco.createIndex()
    return coco


def detect(image, labels, shift=0, masks=False):
    """Every object found at its place, or some pixels beside it."""
    found = boxes(image)
    corners = np.array([(x + shift, y, x + shift + w, y + h) for x, y, w, h in found])
    own = dict(bboxes=corners, labels=np.array(labels), scores=np.linspace(0.9, 0.5, len(found)))
    if masks:
        own["masks"] = [mask(box, SIDE[image]) for box in found]
    return dict(img_id=image, pred_instances=own)


NOTHING = dict(img_id=4, pred_instances=dict(bboxes=[], labels=[], scores=[]))


def test_parts_and_classes(truth):
    """Image 1 is right, 2 is wrong in place and 3 in the class of all."""
    odd = [n % 2 for n in range(12)]
    found = [detect(1, odd[:4]), detect(2, odd[:4], 4), detect(3, [0] * 12), NOTHING]
    rows = average_precisions(truth, found, ("even", "odd"), by_side((40, 100, 300)))
    assert list(rows) == ["all", "0 to 40", "40 to 100", "100 to 300", "300 to inf", "even", "odd"]
    assert [row["images"] for row in rows.values()] == [4, 2, 1, 1, 0, 4, 4]
    assert [row["objects"] for row in rows.values()] == [20, 8, 12, 0, 0, 10, 10]
    assert rows["100 to 300"]["bbox"] is rows["300 to inf"]["bbox"] is None
    assert "segm" not in rows["all"]
    # Of the even ones the k-th right one is the (2k-1)-th in score; of the odd ones none is found.
    even = np.mean([k / (2 * k - 1) for k in range(1, 7)])
    assert rows["40 to 100"]["bbox"] == pytest.approx(even / 2, abs=3e-3)
    assert rows["odd"]["bbox"] < rows["even"]["bbox"]
    assert rows["all"]["bbox"] == pytest.approx(
        (rows["even"]["bbox"] + rows["odd"]["bbox"]) / 2, abs=1e-3
    )


def test_labels_are_in_the_order_of_the_classes(truth):
    """Not of the ids, by which COCO sorts them."""
    odd = [1 - n % 2 for n in range(12)]
    found = [detect(1, odd[:4]), detect(2, odd[:4]), detect(3, odd), NOTHING]
    rows = average_precisions(truth, found, ("odd", "even"), {})
    assert {name: row["bbox"] for name, row in rows.items()} == dict(all=1, odd=1, even=1)
    found = [detect(1, [0] * 4), detect(2, [0] * 4), detect(3, [0] * 12), NOTHING]
    rows = average_precisions(truth, found, ("odd", "even"), {})
    assert (rows["even"]["bbox"], rows["odd"]["bbox"] > 0.3) == (0, True)


def test_all_detections_count(truth):
    """Objects beyond the hundredth of an image do."""
    count = 150
    truth.dataset["annotations"] = [
        dict(id=n, image_id=4, category_id=3, bbox=[n, 1, 1, 9], area=9, iscrowd=0)
        for n in range(1, count + 1)
    ]
    truth.createIndex()
    corners = [(n, 1, n + 1, 10) for n in range(1, count + 1)]
    own = dict(bboxes=corners, labels=[0] * count, scores=np.linspace(0.9, 0.1, count))
    rest = [dict(img_id=i, pred_instances=dict(bboxes=[], labels=[], scores=[])) for i in (1, 2, 3)]
    rows = average_precisions(truth, [dict(img_id=4, pred_instances=own), *rest], ("even",), {})
    assert rows == dict(all=dict(images=4, objects=count, bbox=1.0))


def test_masks_count_for_themselves(truth):
    """Right masks in boxes that are elsewhere."""
    odd = [n % 2 for n in range(12)]
    found = [detect(i, odd[: SIDE[i] // 5], 4, masks=True) for i in (1, 2, 3)]
    found.append(dict(img_id=4, pred_instances=dict(NOTHING["pred_instances"], masks=[])))
    rows = average_precisions(truth, found, ("even", "odd"), {})
    assert (rows["all"]["bbox"], rows["all"]["segm"]) == (0, 1)


def test_what_cannot_be_measured_is_said(truth):
    with pytest.raises(ValueError, match="have no class other"):
        average_precisions(truth, [], ("other",), {})
    with pytest.raises(ValueError, match=r"3 images were not tested, e\.g\. 1"):
        average_precisions(truth, [NOTHING], ("even",), {})
