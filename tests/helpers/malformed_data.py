"""Malformed images and annotations in the stock pipelines: what happens with Swin and SOFT++.

    python tests/helpers/malformed_data.py            # rewrites the table in docs/robustness.md

Each case replaces one image (or its annotations) of a small data set, trains two iterations on
batches that contain it, and evaluates on a set that contains it.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from fault_runs import SOFTPP, SWIN, config, train
from PIL import Image
from tabulate import tabulate
from true_layout import make_demo_data

from mmsoft.fileio import write_whole

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/robustness.md"
BEGIN = "<!-- malformed data: python tests/helpers/malformed_data.py -->"
END = "<!-- end of malformed data -->"
MODELS = {"Swin": SWIN, "SOFT++": SOFTPP}
NUMBER = 2  # the image that is replaced, of both splits


def image_paths(folder):
    for split, ade in (("train", "training"), ("val", "validation")):
        mask = f"data/shapes/ade/annotations/{ade}/ADE_{split}_{NUMBER:08d}.png"
        yield folder / f"data/shapes/coco/{split}2017/{NUMBER:012d}.jpg", None
        yield folder / f"data/shapes/ade/images/{ade}/ADE_{split}_{NUMBER:08d}.jpg", folder / mask


def edit_json(folder, change):
    for path in (folder / "data/shapes/coco/annotations").glob("*.json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def replace_image(encode, size=None):
    """A case that rewrites the image through `encode(bgr) -> bytes`; the content names the format.

    With a `size` (width, height) the image, its mask and its entry in the JSON get that size.
    """

    def apply(folder):
        for path, mask in image_paths(folder):
            picture = cv2.imread(str(path))
            if size:
                picture = cv2.resize(picture, size)
                if mask:
                    labels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
                    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
                    cv2.imwrite(str(mask), labels)
            path.write_bytes(encode(picture))
        if size:
            edit_json(folder, resize_entry)

    def resize_entry(content):
        for entry in content["images"]:
            if entry["id"] == NUMBER:
                entry["width"], entry["height"] = size

    return apply


def encoded(suffix, change=lambda picture: picture):
    return lambda picture: cv2.imencode(suffix, change(picture))[1].tobytes()


jpeg = encoded(".jpg")
grey = encoded(".jpg", lambda picture: cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
sixteen_bit = encoded(".png", lambda picture: picture.astype(np.uint16) * 257)
rgba = encoded(".png", lambda picture: cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA))


def truncated(picture):
    return jpeg(picture)[: len(jpeg(picture)) // 2]


def rotated(picture):
    """Stored upright, with the note that it is to be turned by a quarter."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        image = Image.fromarray(picture[..., ::-1])
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(file.name, exif=exif)
        return Path(file.name).read_bytes()


def of_image(content):
    return [a for a in content["annotations"] if a["image_id"] == NUMBER]


def crowd(content):
    for annotation in of_image(content):
        annotation["iscrowd"] = 1
        annotation["segmentation"] = {"counts": [0, 64 * 64], "size": [64, 64]}


def empty(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != NUMBER]


def without_fields(content):
    for annotation in of_image(content):
        for name in ("segmentation", "iscrowd", "area"):
            annotation.pop(name)


def set_mask(value):
    def apply(folder):
        for _, mask in image_paths(folder):
            if mask and value is None:
                mask.unlink()
            elif mask:
                labels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
                labels[:8] = value
                cv2.imwrite(str(mask), labels)

    return apply


def json_case(change):
    return lambda folder: edit_json(folder, change)


BOTH, DETECTION, SEGMENTATION = ("retinanet", "upernet"), ("retinanet",), ("upernet",)
CASES = {
    "grey JPEG": (BOTH, replace_image(grey)),
    "16-bit PNG": (BOTH, replace_image(sixteen_bit)),
    "RGBA PNG": (BOTH, replace_image(rgba)),
    "truncated JPEG": (BOTH, replace_image(truncated)),
    "1x1 pixel": (BOTH, replace_image(jpeg, (1, 1))),
    "4000x37 pixels": (BOTH, replace_image(jpeg, (4000, 37))),
    "EXIF rotation, 96x64": (BOTH, replace_image(rotated, (96, 64))),
    "COCO: only crowds": (DETECTION, json_case(crowd)),
    "COCO: image without annotations": (DETECTION, json_case(empty)),
    "COCO: no segmentation, area, iscrowd": (DETECTION, json_case(without_fields)),
    "COCO: no list of annotations": (DETECTION, json_case(lambda data: data.pop("annotations"))),
    "ADE: label 200 of 6": (SEGMENTATION, set_mask(200)),
    "ADE: label 0 (unlabelled)": (SEGMENTATION, set_mask(0)),
    "ADE: no mask": (SEGMENTATION, set_mask(None)),
}
JOBS = [(name, model) for name, (models, _) in CASES.items() for model in models]


def stock_pipelines(cfg, model):
    """The resizing of the libraries' own configs, at 96 pixels."""
    train_pipeline = cfg.train_dataloader.dataset.pipeline
    if model == "upernet":
        train_pipeline[2:2] = [
            dict(type="RandomResize", scale=(96, 96), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(64, 64), cat_max_ratio=0.75),
        ]
        resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.pipeline = [cfg.val_dataloader.dataset.pipeline[0], resize] + [
                step for step in loader.dataset.pipeline[1:] if step.type != "Resize"
            ]
            loader.batch_size = 1
    else:
        train_pipeline.insert(2, dict(type="Resize", scale=(96, 96), keep_ratio=True))
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            for step in loader.dataset.pipeline:
                if step.type == "Resize":
                    step.update(scale=(96, 96), keep_ratio=True)


def outcome(shapes, name, model, backbone):
    """'trains, evaluates', or the error."""
    _, change = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(shapes / "data", folder / "data")
        change(folder)
        cfg = config(ROOT, folder, model, folder / "work", backbone=backbone)
        stock_pipelines(cfg, model)
        cfg.custom_hooks = [dict(type="mmsoft.FiniteGradientHook")]
        done = []
        try:
            runner, _ = train(cfg)
            done.append("trains")
            runner.val()
            done.append("evaluates")
        except Exception as error:
            text = str(error).replace(str(folder), "").strip().splitlines()
            what = text[0][:70] if text else ""
            done.append(f"{type(error).__name__}: {what}".strip(": ").replace("|", "/"))
        return ", ".join(done)


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(Path(folder))
        for job in JOBS:
            rows.append([*job, *(outcome(Path(folder), *job, each) for each in MODELS.values())])
            print(rows[-1], file=sys.stderr, flush=True)
    table = tabulate(rows, ["data", "model", *MODELS], "pipe")
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    with write_whole(PAGE) as partial:
        partial.write_text(f"{text[:start]}\n\n{table}\n\n{text[end:]}")


if __name__ == "__main__":
    main()
