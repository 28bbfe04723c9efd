"""Where a detector goes wrong: its average precision on parts of a data set."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

Image = Mapping[str, Any]  # of the annotations


def average_precisions(
    truth: Any,
    found: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    parts: Mapping[str, Callable[[Image], bool]],
) -> dict[str, dict[str, Any]]:
    """COCO's average precision on parts of the images, and class by class.

    Unlike the mAP of COCO's summary it counts all detections of an image, not the 100 with the
    highest scores; where images have more objects than that, it is the larger of the two.

    Args:
        truth: the annotations, ``pycocotools.coco.COCO``.
        found: of each image what MMDetection's ``DumpDetResults`` (``mim test --out``) writes.
        classes: names in the order of the labels.
        parts: name -> whether an image belongs to it.

    Returns:
        Of each part, ``'all'`` first, and, where there are several, of each class on all images:
        ``images`` and ``objects``, their numbers, ``bbox`` and, of models with masks, ``segm``, the
        precisions, ``None`` where there is no object.

    Raises:
        ValueError: the annotations lack a class, or an image was not tested.
    """
    ids = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    if missing := [name for name in classes if name not in ids]:
        raise ValueError(f"the annotations have no class {', '.join(missing)}")
    if untested := set(truth.imgs) - {image["img_id"] for image in found}:
        raise ValueError(f"{len(untested)} images were not tested, e.g. {min(untested)}")
    numbers = [ids[name] for name in classes]
    with_masks = any("masks" in image["pred_instances"] for image in found)
    results = {
        kind: {image["img_id"]: _entries(image, numbers, kind) for image in found}
        for kind in ("bbox", "segm")[: 1 + with_masks]
    }
    images = {"all": list(truth.imgs)}
    images |= {name: [i for i, of in truth.imgs.items() if has(of)] for name, has in parts.items()}
    rows: dict[str, dict[str, Any]] = {
        name: dict(images=len(own), objects=_objects(truth, own, numbers))
        for name, own in images.items()
    }
    if len(classes) > 1:
        for name, number in zip(classes, numbers):
            objects = _objects(truth, images["all"], [number])
            rows[name] = dict(images=len(images["all"]), objects=objects)
    for kind, entries in results.items():
        for name, own in images.items():
            precision = _precision(truth, entries, own, numbers, kind)
            rows[name][kind] = _mean(precision)
            if name == "all" and len(classes) > 1:
                for number, label in enumerate(classes):
                    rows[label][kind] = _mean(precision[:, :, number])
    return rows


def by_side(edges: Sequence[float]) -> dict[str, Callable[[Image], bool]]:
    """Parts of images by size, the square root of the number of pixels, between two edges each."""

    def between(low: float, high: float) -> Callable[[Image], bool]:
        return lambda image: low**2 <= image["height"] * image["width"] < high**2

    return {f"{low} to {high}": between(low, high) for low, high in pairwise((0, *edges, inf))}


def _entries(image: Mapping[str, Any], numbers: Sequence[int], kind: str) -> list[dict[str, Any]]:
    """Detections as COCO has them."""
    own = image["pred_instances"]
    boxes = np.array(own["bboxes"], float).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    name, places = ("bbox", boxes.tolist()) if kind == "bbox" else ("segmentation", own["masks"])
    return [
        {
            "image_id": image["img_id"],
            "category_id": numbers[int(label)],
            "score": float(score),
            name: place,
        }
        for label, score, place in zip(own["labels"], own["scores"], places)
    ]


def _precision(
    truth: Any,
    entries: Mapping[int, Sequence[Mapping[str, Any]]],
    images: Sequence[int],
    numbers: Sequence[int],
    kind: str,
) -> np.ndarray:
    """Precision by IoU threshold, recall and class; -1 where there is no object."""
    from pycocotools.cocoeval import COCOeval

    own = [dict(entry) for image in images for entry in entries[image]]
    if not own:
        return np.array([[[0.0 if _objects(truth, images, [n]) else -1.0 for n in numbers]]])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(own), kind)
        evaluation.params.imgIds = list(images)
        evaluation.params.catIds = list(numbers)
        evaluation.params.maxDets = [len(own)]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    # COCOeval sorts the classes by their ids.
    order = [sorted(numbers).index(number) for number in numbers]
    return evaluation.eval["precision"][:, :, order, 0, 0]


def _objects(truth: Any, images: Sequence[int], numbers: Sequence[int]) -> int:
    """How many there are; COCO would take no images for all of them."""
    return len(truth.getAnnIds(images, numbers, iscrowd=False)) if images else 0


def _mean(precision: np.ndarray) -> float | None:
    there = precision[precision > -1]
    return round(float(there.mean()), 4) if there.size else None
