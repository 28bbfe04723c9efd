"""Convert the blood cells of BCCD from VOC's XML to COCO.

    git clone https://github.com/Shenggan/BCCD_Dataset SOURCE
    python tools/dataset_converters/bccd.py SOURCE data/bccd

SOURCE has `BCCD/{Annotations,ImageSets/Main,JPEGImages}`. MMDetection reads

    OUT/images/{train,val,test}/*.jpg    OUT/annotations/instances_{train,val,test}.json

The splits are the repository's. (MMDetection's own `pascal_voc.py` knows VOC's twenty classes and
years only.) Boxes are cut at the border of the image. What is broken is named and left out: an
image that is missing or cannot be read, or whose XML is missing or malformed, a class that is not
one of the three, a box that is a line or a single pixel, as two of the repository's are. Run it
again after an interruption or a change of SOURCE: annotations are removed first and written last.
"""

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2

from mmsoft.conversion import Problems, copy_whole, parse_args, read_image, track, write_coco

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = ("train", "val", "test")


def boxes(path: Path, width: int, height: int, problems: Problems) -> list[dict[str, Any]] | None:
    """The objects of one image, in COCO's terms: pixels from 0; None if the file is broken."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (OSError, ElementTree.ParseError) as error:
        problems.add(path, f"cannot be read: {error}")
        return None
    found = []
    for number, each in enumerate(objects, 1):
        name = each.findtext("name", "").strip()
        if name not in CLASSES:
            problems.add(path, f"object {number} has the unknown class {name!r}")
            continue
        corners = [each.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = map(float, corners)
        except ValueError:
            problems.add(path, f"object {number} has no box: {corners}")
            continue
        # VOC counts pixels from 1, and both corners belong to the box.
        left, right = max(left - 1, 0), min(right, width)
        top, bottom = max(top - 1, 0), min(bottom, height)
        if not (right - left > 1 and bottom - top > 1):
            problems.add(path, f"object {number} has a box of a line or a pixel: {corners}")
            continue
        size = [right - left, bottom - top]
        box = {"bbox": [left, top, *size], "area": size[0] * size[1]}
        found.append({"category_id": CLASSES.index(name) + 1, **box})
    return found


def convert(root: Path, name: str, target: Path, problems: Problems) -> tuple[dict, list] | None:
    """Copy one image; what COCO has to know, or None if it is left out."""
    source = root / "JPEGImages" / f"{name}.jpg"
    image = read_image(source, cv2.IMREAD_COLOR, problems)
    if image is None:
        return None
    height, width = image.shape[:2]
    found = boxes(root / "Annotations" / f"{name}.xml", width, height, problems)
    if found is None:
        return None
    copy_whole(source, target / source.name)
    return {"file_name": source.name, "width": width, "height": height}, found


def main() -> None:
    """Read the command line and convert."""
    args = parse_args(__doc__)
    root = args.source / "BCCD"
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    for path in lists.values():
        if not path.is_file():
            sys.exit(
                f"error: {path} is missing; SOURCE must be a clone of the repository named above"
            )
    problems = Problems()
    annotations_of = {
        split: args.out / "annotations" / f"instances_{split}.json" for split in SPLITS
    }
    for target in annotations_of.values():  # until all is there: nothing to train on
        target.unlink(missing_ok=True)
    converted = {}
    for split, path in lists.items():
        names = path.read_text().split()
        print(f"{split}: {len(names)} images")
        folder = args.out / "images" / split
        results = [convert(root, name, folder, problems) for name in track(names, len(names))]
        converted[split] = [result for result in results if result]
    for split, target in annotations_of.items():
        images, annotations = write_coco(target, converted[split], CLASSES)
        print(f"{target}: {images} images, {annotations} cells")
    print(problems.summary())


if __name__ == "__main__":
    main()
