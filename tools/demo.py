"""Train and test a small Mask R-CNN and a small UperNet on generated data, and draw predictions.

    python tools/demo.py                                    # the demo: minutes on two cores
    python tools/demo.py --variant softpp-mini-no-attention # the same without the attention term
    python tools/demo.py --variant pvt-t                    # the same with PVT-Tiny as backbone
    python tools/demo.py --seed 1                           # the demo from another seed

Each step is a plain `mim` command, printed before it runs. Everything goes to work_dirs/demo (a
variant's to work_dirs/demo-VARIANT, that of another seed to a folder that ends in -seedN),
replaced by every run: `summary.json`, `loss_curves.png`, `predictions/` of validation images, and
under `detection/` and `segmentation/` the logs and checkpoints. The data, data/shapes, are kept.
"""

import argparse
import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import mmcv
import numpy as np
import torch
from mmengine import Config, load
from mmengine.structures import InstanceData, PixelData
from pycocotools.coco import COCO
from pycocotools.mask import decode
from tabulate import tabulate

from mmsoft.commands import CommandError, read_scalars, train_and_test

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
DATA = "data/shapes"
VARIANTS = ("softpp-mini", "softpp-mini-no-attention", "pvt-t")
NEEDED_BYTES = 500e6  # data, checkpoints and pictures take less
MAX_SEED = 9
PAINTED = 12  # validation images drawn one by one
OVERVIEW = 4  # of these, drawn in one picture too
SCALE = 3  # of the pictures
SCORE = 0.4  # detections below this score are not drawn
LABELS = dict(box_ap="box AP", mask_ap="mask AP", miou="mIoU")


class DemoError(Exception):
    """Something the user can fix; the message is one line."""


@dataclass
class Task:
    """One model to train and test."""

    name: str
    package: str
    config: str
    metrics: dict[str, str]  # summary.json's name of a figure: mmengine's
    scale: float  # from mmengine's unit to 0..1
    out: str  # what `mim test --out` writes

    def folder(self, work_dir: Path) -> Path:
        """Where the logs, checkpoint and predictions go."""
        return work_dir / self.name


def tasks(variant: str) -> list[Task]:
    """The two models of a variant."""
    det, seg = f"mask-rcnn_{variant}_fpn_shapes.py", f"upernet_{variant}_shapes.py"
    aps = dict(box_ap="coco/bbox_mAP", mask_ap="coco/segm_mAP")
    return [
        Task("detection", "mmdet", f"configs/demo/{det}", aps, 1, "results.pkl"),
        Task("segmentation", "mmseg", f"configs/demo/{seg}", dict(miou="mIoU"), 0.01, "results"),
    ]


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def make_data() -> None:
    """Write the data set, unless it is complete."""
    command = ["tools/dataset_converters/make_shapes.py", DATA]
    print(f"\n== data\n   $ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise DemoError("the data set could not be made: see the line above")


def measure(task: Task, work_dir: Path, seed: int) -> dict[str, float]:
    """Train and test; give the metrics, 0 to 1."""
    folder = task.folder(work_dir)
    gpus = ["--gpus", "1" if torch.cuda.is_available() else "0"]
    options = ["--cfg-options", f"randomness.seed={seed}"] if seed else []  # 0 is the configs'
    run = train_and_test(
        task.name,
        [task.package, task.config, *gpus],
        folder,
        ROOT,
        training=options,
        testing=["--out", str(folder.relative_to(ROOT) / task.out)],
    )
    return {name: round(run.metrics[key] * task.scale, 4) for name, key in task.metrics.items()}


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def paint_curves(all_tasks: list[Task], work_dir: Path) -> None:
    """One panel of training losses and one of validation metrics per task."""
    figure, axes = plt.subplots(2, len(all_tasks), figsize=(11, 7), layout="constrained")
    for task, (top, bottom) in zip(all_tasks, axes.T, strict=True):
        entries = read_scalars(task.folder(work_dir))
        losses = [entry for entry in entries if "loss" in entry]
        names = [name for name in losses[0] if "loss" in name]
        for name in names if len(names) > 2 else ["loss"]:
            values = [entry[name] for entry in losses]
            top.plot([entry.get("iter", entry["step"]) for entry in losses], values, label=name)
        top.set(title=f"{task.name}: training", xlabel="iteration", ylabel="loss", ylim=(0, None))
        top.legend()
        for name, key in task.metrics.items():
            scores = [entry for entry in entries if key in entry]
            values = [entry[key] * task.scale for entry in scores]
            bottom.plot([entry["step"] for entry in scores], values, "o-", label=LABELS[name])
        unit = "epoch" if task.package == "mmdet" else "iteration"
        bottom.set(title=f"{task.name}: validation", xlabel=unit, ylim=(0, 1))
        bottom.set_xlim(0, None)
        bottom.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(work_dir / "loss_curves.png", dpi=110)
    plt.close(figure)


def enlarge(pixels: np.ndarray, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """`[H, W, ...]` in more pixels, so that the libraries' lines and letters do not cover it."""
    return cv2.resize(pixels, None, fx=SCALE, fy=SCALE, interpolation=interpolation)


def instances(
    image: dict, boxes: Any, labels: Any, masks: Iterable[np.ndarray], **more: Any
) -> InstanceData:
    """Objects of an enlarged image of COCO, maybe none; boxes are `x1, y1, x2, y2`."""
    size = (SCALE * image["height"], SCALE * image["width"])
    return InstanceData(
        bboxes=torch.as_tensor(boxes).reshape(-1, 4) * SCALE,
        labels=torch.as_tensor(labels),
        masks=np.array([enlarge(mask) for mask in masks], bool).reshape(-1, *size),
        **more,
    )


def detections(task: Task, work_dir: Path) -> Iterator[tuple[Path, Any]]:
    """Image files with ground truth and prediction."""
    from mmdet.structures import DetDataSample

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(ROOT / DATA / "coco/annotations/instances_val2017.json")
    results = load(task.folder(work_dir) / task.out)
    for result in sorted(results, key=lambda result: result["img_id"]):
        image, own = truth.imgs[result["img_id"]], truth.imgToAnns[result["img_id"]]
        found = result["pred_instances"]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in own)]
        labels, masks = [a["category_id"] - 1 for a in own], map(truth.annToMask, own)
        sample = DetDataSample(gt_instances=instances(image, corners, labels, masks))
        boxes, labels, masks = found["bboxes"], found["labels"], map(decode, found["masks"])
        sample.pred_instances = instances(image, boxes, labels, masks, scores=found["scores"])
        yield ROOT / DATA / "coco/val2017" / image["file_name"], sample


def segmentations(task: Task, work_dir: Path) -> Iterator[tuple[Path, Any]]:
    """Image files with ground truth and prediction."""
    from mmseg.structures import SegDataSample

    for path in sorted((ROOT / DATA / "ade/annotations/validation").iterdir()):
        sample = SegDataSample()
        for name, file in (("gt", path), ("pred", task.folder(work_dir) / task.out / path.name)):
            # Both files count from 1: 0 is "unlabelled" in ADE20K.
            index = enlarge(mmcv.imread(file, "grayscale")).astype(int) - 1
            sample.set_data({f"{name}_sem_seg": PixelData(data=torch.from_numpy(index)[None])})
        yield ROOT / DATA / "ade/images/validation" / f"{path.stem}.jpg", sample


def paint_predictions(all_tasks: list[Task], work_dir: Path) -> None:
    """Draw image, ground truth and prediction by the libraries' visualizers, and an overview."""
    from mmdet.visualization import DetLocalVisualizer
    from mmseg.visualization import SegLocalVisualizer

    folder = work_dir / "predictions"
    folder.mkdir()
    detection, segmentation = all_tasks
    meta = Config.fromfile(ROOT / segmentation.config).val_dataloader.dataset.metainfo
    palette = [tuple(colour) for colour in meta.palette]
    for task, visualizer, first, samples, options in (
        (detection, DetLocalVisualizer, 1, detections, dict(pred_score_thr=SCORE)),
        (segmentation, SegLocalVisualizer, 0, segmentations, {}),
    ):
        artist = visualizer(alpha=0.6)
        artist.dataset_meta = dict(classes=meta.classes[first:], palette=palette[first:])
        rows = []
        for number, (file, sample) in enumerate(islice(samples(task, work_dir), PAINTED), 1):
            picture = enlarge(mmcv.imread(file), cv2.INTER_CUBIC)
            grey = mmcv.gray2bgr(mmcv.bgr2gray(picture))  # for the colours to show
            path = folder / f"{task.name}_{number:02d}.png"
            artist.add_datasample(path.name, grey, sample, out_file=str(path), **options)
            rows.append(np.hstack([picture, mmcv.imread(path)]))
            mmcv.imwrite(rows[-1], str(path))
        mmcv.imwrite(np.vstack(rows[:OVERVIEW]), str(folder / f"{task.name}_overview.png"))


# ---------------------------------------------------------------------------------------------
# Everything
# ---------------------------------------------------------------------------------------------


def print_table() -> None:
    """Print every run that has a summary."""
    rows = []
    for variant in VARIANTS:
        for seed in range(MAX_SEED + 1):
            path = place(variant, seed) / "summary.json"
            if path.is_file():
                summary = json.loads(path.read_text())
                scores = (summary[name] for name in LABELS)
                rows.append([variant, seed, *scores, summary["seconds"] / 60])
    header = ["backbone", "seed", *LABELS.values(), "minutes"]
    print("\n" + tabulate(rows, header, "plain", floatfmt=(*("",) * 2, *(".3f",) * 3, ".1f")))


def place(variant: str, seed: int) -> Path:
    """The folder of a run's results."""
    name = "demo" if variant == VARIANTS[0] else f"demo-{variant}"
    return ROOT / "work_dirs" / (f"{name}-seed{seed}" if seed else name)


def demo(variant: str, seed: int = 0) -> None:
    """Run everything."""
    start = time.time()
    work_dir = place(variant, seed)
    if work_dir.exists():
        shutil.rmtree(work_dir)
    work_dir.mkdir(parents=True)
    free = shutil.disk_usage(work_dir).free
    if free < NEEDED_BYTES:
        raise DemoError(
            f"{work_dir} has {free / 1e6:.0f} MB of disk left and the demo needs "
            f"{NEEDED_BYTES / 1e6:.0f} MB; free some and run it again"
        )
    make_data()
    detection, segmentation = tasks(variant)
    summary: dict[str, float] = {}
    for task in (detection, segmentation):
        summary |= measure(task, work_dir, seed)
    print("\n== drawing", flush=True)
    paint_curves([detection, segmentation], work_dir)
    paint_predictions([detection, segmentation], work_dir)
    summary["seconds"] = round(time.time() - start, 1)
    (work_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table()
    print(f"\nLook at {work_dir.relative_to(ROOT)}/predictions and loss_curves.png.")


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0], help="the backbone")
    parser.add_argument(
        "--seed", type=int, choices=range(MAX_SEED + 1), default=0, help="of weights and order"
    )
    args = parser.parse_args()
    try:
        demo(args.variant, args.seed)
    except (CommandError, DemoError) as error:
        sys.exit(f"\nerror: {error}")
    except OSError as error:  # a full disk, most of all
        sys.exit(f"\nerror: {error}; fix that and run it again")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command starts the training again")


if __name__ == "__main__":
    main()
