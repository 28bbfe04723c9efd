"""Small data sets in the layout that the stock configs expect under ``data/``."""

import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools/dataset_converters/make_shapes.py"
# Under no name in sys.modules, where the processes of test_make_shapes.py look theirs up.
_spec = importlib.util.spec_from_file_location("make_shapes", SCRIPT)
GENERATOR = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(GENERATOR)
# A process would take longer to start than the few scenes to draw.
GENERATOR.ProcessPoolExecutor = ThreadPoolExecutor

# COCO numbers its 80 categories from 1 to 90 and leaves these out.
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
SHAPE_IDS = (1, 3, 44, 67, 90)  # what the five shapes count as


def make_shapes(folder: Path, train: int, val: int, size: int) -> Path:
    """Generate `train` and `val` scenes of `size` pixels; gives the folder of both layouts."""
    out = folder / "shapes"
    GENERATOR.make_dataset(out, train, val, size, seed=0)
    return out


def make_demo_data(folder: Path, train: int = 12, val: int = 4, size: int = 64) -> Path:
    """Make ``data/shapes`` in `folder`, where the configs of the demo look for it."""
    return make_shapes(folder / "data", train, val, size)


def make_coco(folder: Path, train: int = 4, val: int = 2, size: int = 96) -> Path:
    """Make ``data/coco`` in `folder`: the shapes under the names of five of the 80 categories."""
    from mmdet.datasets import CocoDataset

    coco = _make_layout("coco", folder / "data/coco", train, val, size)
    names = CocoDataset.METAINFO["classes"]
    for path in coco.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = SHAPE_IDS[annotation["category_id"] - 1]
        content["categories"] = [
            {"id": i, "name": name} for i, name in zip(COCO_IDS, names, strict=True)
        ]
        path.write_text(json.dumps(content))
    return coco


def make_ade20k(folder: Path, train: int = 4, val: int = 2, size: int = 96) -> Path:
    """Make ``data/ade/ADEChallengeData2016`` in `folder`: six of the 150 classes occur."""
    return _make_layout("ade", folder / "data/ade/ADEChallengeData2016", train, val, size)


def _make_layout(layout: str, target: Path, train: int, val: int, size: int) -> Path:
    shapes = make_shapes(target.parent, train, val, size)
    os.replace(shapes / layout, target)
    shutil.rmtree(shapes)
    return target


def make_imagenet(folder: Path, scenes: int = 8, size: int = 96) -> Path:
    """Make ``data/imagenet`` in `folder`: 1000 folders per split, one image each.

    MMPreTrain's data set refuses any other number of folders. The images are `scenes` different
    ones, linked; ``*_dataloader.dataset.indices=N`` limits a run to N of them.
    """
    imagenet = folder / "data/imagenet"
    shapes = make_shapes(folder, scenes, 1, size)
    pictures = sorted((shapes / "coco/train2017").iterdir())
    for split in ("train", "val"):
        for label in range(1000):
            target = imagenet / split / f"n{label:08d}"
            target.mkdir(parents=True)
            os.link(pictures[label % scenes], target / f"{target.name}_1.JPEG")
    shutil.rmtree(shapes)
    return imagenet
