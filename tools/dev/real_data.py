r"""Train and test a config on real images, and make docs/real_data.md from all such runs.

    python tools/dev/real_data.py run configs/nuclei/upernet_softpp-mini_nuclei.py \
        --seed 0 --work-dir work_dirs/upernet_softpp-mini_seed0
    python tools/dev/real_data.py time configs/nuclei/upernet_{softpp-mini,pvtv2-b0}_nuclei.py \
        --work-dir work_dirs/times
    python tools/dev/real_data.py draw work_dirs/upernet_{softpp-mini,pvtv2-b0}_seed0 \
        --out docs/real_data/nuclei_classes.jpg
    python tools/dev/real_data.py table

`run` calls `mim train` and `mim test` in the current folder, whose `data/` has the converted data,
and writes the row to `docs/real_data/CONFIG_seedN.json` when both have ended. With `--iters` the
schedule is that much longer or shorter, warm-up excepted, and the name says so. `time` trains
several configs of one task for a few iterations in turns, on an otherwise idle machine, writes
their seconds per iteration to `docs/real_data/times/TASK.json`, from where the table has them, and
prints how many iterations of each take as long as the first one's schedule. `draw` paints what runs
found on test images beside what is there. `table --check` only compares.
"""

import argparse
import contextlib
import io
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.config import Config
from tabulate import tabulate

from mmsoft.commands import CommandError
from mmsoft.fileio import write_whole
from mmsoft.rows import (
    FIELDS,
    NO_VALIDATION,
    WARM_UP,
    Row,
    Subject,
    conditions,
    digest,
    measure_row,
    name_of,
    read_rows,
    read_times,
    seconds,
    seconds_of,
    spread,
    time_in_turns,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "real_data"
TIMES = ROWS / "times"  # a file for each task
BUDGETS = ROWS / "budgets/mask-rcnn_nuclei.json"
LARGEST = ROWS / "budgets/largest.json"
FIGURE = ROWS / "learning.png"
PAGE = ROOT / "docs" / "real_data.md"
TASKS = {  # by folder and first word of a config's name, in the order of the page
    ("nuclei", "mask-rcnn"): "Nuclei, Mask R-CNN",
    ("nuclei", "upernet"): "Nuclei, UperNet",
    ("bccd", "retinanet"): "Blood cells, RetinaNet",
}
BRIGHT = 100  # mean of an image's values, of 255: below it what is between the nuclei is dark
SCORE = 0.4  # detections below this score are not painted
SIDES = (340, 700)  # edges between sizes of images, square roots of pixels
PICTURES = {  # beside the rows, by `draw`: what they show, and what one sees there
    ("nuclei", "mask-rcnn"): (
        "nuclei_masks.jpg",
        "Nuclei, their masks, and those of two detectors",
        "Colours only tell instances apart. Where nuclei touch, both join or cut some of them; in "
        "the last image both draw them too small, SOFT++ mini more so.",
    ),
    ("nuclei", "upernet"): (
        "nuclei_classes.jpg",
        "Nuclei and background, and what two segmentors take for them",
        "PVTv2-B0 leaves the inside of bright nuclei out in the first image, and SOFT++ mini fills "
        "the embryo in the last.",
    ),
    ("bccd", "retinanet"): (
        "cells.jpg",
        "Blood cells with their boxes, and those of two detectors",
        "Both find cells that the annotations lack: of the first image "
        "one cell alone is annotated, and in the last the white cell is annotated as a platelet. "
        "Where cells overlap, neither separates them.",
    ),
}
BEHIND = {  # by `draw --behind`
    ("nuclei", "mask-rcnn"): (
        "nuclei_masks_behind.jpg",
        "PVTv2-B0",
        "SOFT++ mini leaves holes in nuclei (first), draws dim ones too small (second) and finds "
        "more than there are where the image is blurred (third).",
    ),
    ("nuclei", "upernet"): (
        "nuclei_classes_behind.jpg",
        "ResNet-18 with GroupNorm",
        "SOFT++ mini fills the embryo (first), takes the glow at the border for nuclei (second) "
        "and draws pale ones too small (third).",
    ),
    ("bccd", "retinanet"): (
        "cells_behind.jpg",
        "PVTv2-B0",
        "Where cells overlap or are cut by the border, SOFT++ mini draws more boxes than there are "
        "cells.",
    ),
}
IMAGES = {  # single ones, of larger backbones
    ("nuclei", "mask-rcnn"): (
        "nuclei_image.jpg",
        "An image of 258 nuclei, their masks, and those of two detectors",
        "SOFT++ Tiny and PVTv2-B1, seed 0, mask AP 0.42 and 0.36. Both take neighbours that touch "
        "for one nucleus, PVTv2-B1 more of them, and miss some of the brightest, which divide.",
    ),
    ("bccd", "retinanet"): (
        "cells_image.jpg",
        "A photograph of blood cells with their boxes, and those of two detectors",
        "SOFT++ Tiny and PVTv2-B1, seed 0, the median of SOFT++ Tiny's images: box AP 0.63 and "
        "0.57. Many of the red cells that both find have no box among the annotations.",
    ),
}
METRICS = {  # of the tests: heading, and the scale to 0..1
    "coco/bbox_mAP": ("box AP", 1),
    "coco/segm_mAP": ("mask AP", 1),
    "mIoU": ("mIoU", 0.01),
}
OF_OBJECTS = re.compile(r"coco/(?P<kind>bbox|segm)_mAP_(?P<suffix>50|75|s|m|l)")
SUFFIXES = {"50": " at IoU 0.5", "75": " at IoU 0.75"} | {
    size[0]: f" of {size} objects" for size in ("small", "medium", "large")
}
OURS = ("softpp-mini", "softpp-t")  # what others are compared with
BACKBONES = {
    "softpp-mini": "SOFT++ mini",
    "softpp-mini-default-norm": "SOFT++ mini, default norm",
    "softpp-mini-batch-norm": "SOFT++ mini, BatchNorm",
    "softpp-mini-released": "SOFT++ mini, released landmarks",
    "softpp-mini-no-attention": "SOFT++ mini without its attention term",
    "softpp-b0": "SOFT++, widths and depths of PVTv2-B0",
    "softpp-t": "SOFT++ Tiny",
    "pvtv2-b0": "PVTv2-B0",
    "pvtv2-b1": "PVTv2-B1",
    "swin-t": "Swin-T",
    "r18": "ResNet-18",
    "r18-group-norm": "ResNet-18, GroupNorm",
}
PACKAGES = ("python", "torch", "mmsoft", "mmengine", "mmcv", "mmdet", "mmsegmentation")
NAME = re.compile(r"(?P<model>mask-rcnn|upernet|retinanet)_(?P<backbone>[^_]+)_\w+")


# ----------------------------------------------------------------------------------------- running


def run(path: Path, seed: int, work_dir: Path, iterations: int | None, out: Path) -> Path:
    """Train and test one row; gives the file of its figures."""
    config = Config.fromfile(path)
    detects = config.default_scope == "mmdet"
    predictions = work_dir.absolute() / ("predictions.pkl" if detects else "predictions")

    def extra(scalars: Sequence[Row]) -> Row:
        where = where_it_is_right if detects else where_classes_agree
        return dict(loss=loss_curve(scalars), where=where(config, predictions))

    return measure_row(
        config,
        path.stem,
        work_dir,
        out,
        root=ROOT,
        seed=seed,
        iterations=iterations,
        training=NO_VALIDATION,  # the test images are looked at once, after the last iteration
        testing=["--out", str(predictions)],
        packages=PACKAGES,
        extra=extra,
    )


def where_it_is_right(config: Config, predictions: Path) -> Row:
    """Average precision by size of the image or class, of all detections."""
    from mmengine import load
    from pycocotools.coco import COCO

    from mmsoft.analysis import average_precisions, by_side

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(config.test_evaluator.ann_file)
    classes = config.test_dataloader.dataset.metainfo.classes
    parts = by_side(SIDES) if len(classes) == 1 else {}  # the photographs of cells are of one size
    return average_precisions(truth, load(predictions), classes, parts)


def where_classes_agree(config: Config, predictions: Path) -> Row:
    """Mean IoU by size and brightness of the image, over the pixels of all its images."""

    def between(low: float, high: float) -> Callable[[np.ndarray], bool]:
        return lambda image: low**2 <= image.shape[0] * image.shape[1] < high**2

    parts: dict[str, Callable[[np.ndarray], bool]] = {"all": lambda image: True}
    for low, high in pairwise((0, *SIDES, math.inf)):
        parts[f"{low} to {high}"] = between(low, high)
    parts["dark"] = lambda image: image.mean() < BRIGHT
    parts["bright"] = lambda image: image.mean() >= BRIGHT
    agreed: dict[str, list[np.ndarray]] = {part: [] for part in parts}
    for path, there, said in maps_of(config, predictions):
        image, classes = mmcv.imread(path), config.test_dataloader.dataset.metainfo.classes
        found = overlaps(there, said, len(classes))
        for part, belongs in parts.items():
            if belongs(image):
                agreed[part].append(found)
    return {
        part: dict(images=len(found), mIoU=round(float(iou(np.sum(found, 0))), 4))
        for part, found in agreed.items()
        if found
    }


def maps_of(config: Config, predictions: Path) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Of a segmentor's test images: the file, and the true and the predicted classes."""
    dataset = config.test_dataloader.dataset
    root = Path(dataset.data_root)
    for name in (root / dataset.ann_file).read_text().split():
        there, said = (
            mmcv.imread(folder / f"{name}.png", "grayscale")
            for folder in (root / dataset.data_prefix.seg_map_path, predictions)
        )
        yield root / dataset.data_prefix.img_path / f"{name}.png", there, said


def overlaps(there: np.ndarray, said: np.ndarray, count: int) -> np.ndarray:
    """Of each of so many classes its pixels in both maps, and in either: ``[classes, 2]``."""
    pairs = [(there == number, said == number) for number in range(count)]
    return np.array([((a & b).sum(), (a | b).sum()) for a, b in pairs])


def iou(counts: np.ndarray) -> float:
    """The mean over the classes that there are, of what :func:`overlaps` counts."""
    return float(np.mean([both / either for both, either in counts if either]))


def loss_curve(scalars: Sequence[Row]) -> list[list[float]]:
    """Of the log: iteration and training loss."""
    return [[entry["step"], round(entry["loss"], 4)] for entry in scalars if "loss" in entry]


def time_configs(
    paths: Sequence[Path], work_dir: Path, out: Path, rounds: int, iterations: int
) -> None:
    """Time configs of one task in turns; say how many iterations last as the first's schedule.

    Raises:
        CommandError: a training failed.
        ValueError: they are of several tasks, or of none.
    """
    tasks = {task_of(dict(config=name_of(path))) for path in paths}
    if len(tasks) > 1:
        raise ValueError("configs that take turns must be of one task")
    target = out / f"{'_'.join(reversed(min(tasks)))}.json"
    subjects = [
        Subject(path.stem, path, extra=dict(digest=digest(Config.fromfile(path)))) for path in paths
    ]
    turns = (rounds, iterations)
    samples = time_in_turns(subjects, work_dir, target, *turns, root=ROOT, packages=PACKAGES)
    medians = [statistics.median(times) for times in samples]
    schedule = Config.fromfile(paths[0], import_custom_modules=False).train_cfg.max_iters
    for path, median in zip(paths, medians):
        equal = schedule * medians[0] / median
        print(f"{path.stem}: {median:.3f} s, {equal:.0f} iterations in the time of {paths[0].stem}")


# ------------------------------------------------------------------------------------ the pictures


@dataclass
class Tested:
    """An image that a run was tested on: what is there, what was found, and how well it agrees."""

    path: Path
    truth: dict[str, Any]
    found: dict[str, Any]
    score: float
    about: str


def tested(work_dir: Path) -> dict[str, Tested]:
    """The images of a run, by name without suffix."""
    config = Config.fromfile(
        min(work_dir.glob("*/vis_data/config.py")), import_custom_modules=False
    )
    return dict((detected if config.default_scope == "mmdet" else segmented)(config, work_dir))


def detected(config: Config, work_dir: Path) -> Iterator[tuple[str, Tested]]:
    """Of a detector; an image's score is its AP, of masks where there are some."""
    from mmengine import load
    from pycocotools.coco import COCO
    from pycocotools.mask import decode

    from mmsoft.analysis import average_precisions

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(config.test_evaluator.ann_file)
    dataset = config.test_dataloader.dataset
    names = dataset.metainfo.classes
    results = load(work_dir / "predictions.pkl")
    numbers = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    labels = {numbers[name]: label for label, name in enumerate(names)}
    parts = {str(i): (lambda image, i=i: image["id"] == i) for i in truth.imgs}
    scores = average_precisions(truth, results, names, parts)
    for result in results:
        image, own = truth.imgs[result["img_id"]], truth.imgToAnns[result["img_id"]]
        found = result["pred_instances"]
        kept = [n for n, score in enumerate(found["scores"]) if score >= SCORE]
        if "masks" in found:
            there = dict(kind="instances", masks=[truth.annToMask(one) for one in own])
            said = dict(kind="instances", masks=[decode(found["masks"][n]) for n in kept])
        else:
            corners = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in own)]
            there = dict(boxes=corners, labels=[labels[one["category_id"]] for one in own])
            said = dict(boxes=found["bboxes"][kept], labels=found["labels"][kept])
            there, said = (dict(kind="boxes", names=names, **part) for part in (there, said))
        score = scores[str(image["id"])]
        path = Path(dataset.data_root, dataset.data_prefix.img, image["file_name"])
        size, count = f"{image['width']}x{image['height']}", len(own)
        about = f"{short(path)}, {size}, {count} object{'s' * (count != 1)}"
        value = score.get("segm", score["bbox"]) or 0.0
        yield path.stem, Tested(path, there, said, value, about)


def segmented(config: Config, work_dir: Path) -> Iterator[tuple[str, Tested]]:
    """Of a segmentor; an image's score is its IoU, mean over the classes in it."""
    names = config.test_dataloader.dataset.metainfo.classes
    for path, there, said in maps_of(config, work_dir / "predictions"):
        score = iou(overlaps(there, said, len(names)))
        truth, found = (dict(kind="classes", names=names, map=one) for one in (there, said))
        about = f"{short(path)}, {there.shape[1]}x{there.shape[0]}"
        yield path.stem, Tested(path, truth, found, score, about)


def short(path: Path) -> str:
    """A name that fits below a panel: the nuclei's are of 64 digits."""
    return path.stem if len(path.stem) <= 16 else path.stem[:8]


def paint(
    work_dirs: Sequence[Path],
    number: int,
    names: Sequence[str],
    width: float,
    out: Path,
    behind: bool = False,
) -> None:
    """Truth and predictions of runs on the same images, from the first run's best to its worst.

    With ``behind``, those on which the second run is furthest ahead of the first.
    """
    from mmsoft.visualization import draw_comparison, save_figure

    runs = {work_dir: tested(work_dir) for work_dir in work_dirs}
    first = next(iter(runs.values()))
    if unknown := [name for name in names if name not in first]:
        raise ValueError(f"no image {unknown[0]} was tested in {work_dirs[0]}")
    ranked = sorted(first, key=lambda name: -first[name].score)
    steps = max(number - 1, 1)
    chosen = names or [ranked[n * (len(ranked) - 1) // steps] for n in range(number)]
    if behind:
        second = runs[work_dirs[1]]
        ranked = sorted(first, key=lambda name: first[name].score - second[name].score)
        chosen = ranked[:number]
    titles = [title_of(work_dir) for work_dir in work_dirs]
    if len(set(titles)) < len(titles):  # several seeds
        titles = [work_dir.name for work_dir in work_dirs]
    rows = []
    for name in chosen:
        images = [run[name] for run in runs.values()]
        columns = {"truth": images[0].truth}
        columns |= {title: image.found for title, image in zip(titles, images)}
        scores = ", ".join(f"{image.score:.2f}" for image in images)
        picture = mmcv.imread(images[0].path, channel_order="rgb")
        rows.append((picture, columns, f"{images[0].about}: {scores}"))
    save_figure(draw_comparison(rows, width), out)


def title_of(work_dir: Path) -> str:
    """The backbone of a run."""
    (path,) = work_dir.glob("*.py")
    match = NAME.match(path.stem)
    return BACKBONES.get(match["backbone"] if match else "", path.stem)


# ---------------------------------------------------------------------------------------- the page

HEAD = """# Real images

Generated by `python tools/dev/real_data.py table`; do not edit.

Backbones inside the same heads, on the nuclei of the 2018 Data Science Bowl (531 images for
training, 133 for testing) and on the blood cells of BCCD (205 and 72, at 320x240). Everything
begins at random: no weights are loaded, and a run is a few hundred iterations on a CPU. What counts
is the difference between rows. The recipe is one for all backbones of a task: images, optimizer,
learning rate, heads. Configs are in `configs/nuclei/` and `configs/bccd/`, commands in their
READMEs and in `tools/dev/real_data.py`, one for each row. No row of these configs that was measured
is left out; norms and filters that were tried and dropped are in [the
method](method.md#norm-of-the-patch-embeddings). Schedules of other lengths were measured beside
SOFT++ mini alone.

- **SOFT++ has GroupNorm in all its patch embeddings here**, as its configs say. It was chosen on
  the nuclei, by mask AP on these test images; peers have their own norms. The blood cells had no
  part in it. Rows with BatchNorm, as released, and of ResNet-18 with GroupNorm show what few images
  in an iteration, two (UperNet: four), make of that.
- **The default has it in the first convolution alone**, because GroupNorm in all
  [loses](method.md#what-the-norm-has-to-do-with-it) where test images are composed otherwise. Of
  Mask R-CNN on the nuclei it is 0.01 of mask AP behind, of UperNet and on the blood cells not. Its
  rows were not timed. Other variants of SOFT++ were not trained with it.
- **Largest images.** The one of 1040x1388 is in the training set; its result stands apart. Of the
  four above 700 pixels that are tested, three have 1024x1024, and one of 1272x603 has 375 of their
  656 nuclei.
- The nuclei's rows of PVTv2-B0 and of SOFT++ with BatchNorm but for UperNet's seed 1 were trained
  at 39c2f01 and tested again at 5b116c7, since when tests fill nothing up, and attention leaves out
  what is ([why](method.md#padding-of-images)); the crops of training have nothing of the kind.
- **Blood cells are padded**, from 320x240 to 320x256, in training and tests: SOFT++ with GroupNorm
  leaves these 16 rows out, which the other backbones see; what that is worth was not measured.
  There BatchNorm is ahead of GroupNorm, on the nuclei far behind it.

Parameters are those of the whole model, heads included. Seconds per iteration are the median, with
the quartiles, over runs of a few iterations in which all configs of a task took turns on an
otherwise idle machine, loading of images included, and training seconds those of so many
iterations; "-" where that was not measured. Peak memory is the resident memory of the training
process, of several seeds the highest.
Other figures of several seeds are their mean, with the lowest and the highest in parentheses; a
seed sets the initial weights and the order of the images. Rows of one seed have no range: how far
seeds differ is to be seen in the others.
"""
EMPTY = "\nNothing has been measured yet.\n"
EQUAL_TIME = """
The same time: schedules made shorter or longer, so that training takes as long as that of {ours},
by the seconds per iteration above: training seconds are their product with the iterations, not
taken from these runs, two of which shared the machine. Where a length was chosen by
earlier times, its share of {ours}'s time is not 1.

"""
SHEET = """
Test images of seed 0, from the best of SOFT++ mini to its worst; below each its score, and that of
the other: AP, or mean IoU. """
WHERE = """
Where they are right and where wrong: {measure} by {parts}{more}.

"""
AHEAD = """
Where others are ahead of {ours} by more than the seeds of either differ; where both have one seed,
by anything that three digits show.{counts}

"""
COUNTS = """ COCO's AP counts the
best 100 detections of an image, at one IoU and by size of the objects all of them."""
NOWHERE = """
None is ahead of {ours} there by more than the seeds of either differ.
"""
ALL_COUNT = """, of all detections; COCO's
mAP above counts the best 100 of each image, which is less where there are more objects than that"""
ACROSS = """
### Across sizes of images

The Mask R-CNN with SOFT++ mini was trained on crops of 256x256; here its mask AP on whole images,
by the square root of their numbers of pixels, with budgets of landmarks that it was not trained
with: 49 is the default, and `all` leaves it to the tolerance, which by content takes no landmark
that the others explain. The third column is what an image of 1024x1024 got at most. The last line
is the same model trained without the attention term: these images do not need it.
`tools/analysis_tools/landmark_budgets.py --budgets 16 49 256 all --by-size {sides}` measured it:
recorded in commit a50fb27, of the largest image below in 862c0e0.

"""


LARGEST_IMAGE = """
The image of 1040x1388, tested though it is in the training set: mask AP of seeds 0, 1, 2, which
differ by up to half: one image of 14 nuclei says little. They are about 110 pixels wide. In the
training set 0.2 % are above 90 and half below 24, so most seeds of both backbones find parts of
them, in boxes of 40 to 80 pixels, which cut the masks; no budget of landmarks changes that.

"""


def read(folder: Path) -> list[Row]:
    """All rows of a folder.

    Raises:
        ValueError: naming the file that is not one.
    """
    return read_rows(folder, "real_data.py", task_of, FIELDS)


def task_of(row: Row) -> tuple[str, str]:
    """The key in TASKS.

    Raises:
        ValueError: there is none.
    """
    folder, _, file = row["config"].partition("/")
    match = NAME.match(file)
    if match is None or (folder, match["model"]) not in TASKS or match["backbone"] not in BACKBONES:
        raise ValueError(f"config {row['config']} is of no known task and backbone")
    return folder, match["model"]


def backbone_of(row: Row) -> str:
    """The key in BACKBONES."""
    match = NAME.match(row["config"].partition("/")[2])
    assert match  # as read() has checked
    return match["backbone"]


def times_by_config(folder: Path) -> dict[str, Row]:
    """What `time` has written."""
    return {times["config"]: times for times in read_times(folder, "real_data.py", task_of)}


def read_budgets(path: Path) -> list[Row]:
    """What `landmark_budgets.py` has written.

    Raises:
        ValueError: a seed was measured twice with a budget, or by another model.
    """
    rows = json.loads(path.read_text()) if path.is_file() else []
    if len({row["model"] for row in rows}) > 1:
        raise ValueError(f"{path} has several kinds of landmarks")
    seen = [(row["budget"], row["seed"]) for row in rows]
    if twice := {each for each in seen if seen.count(each) > 1}:
        raise ValueError(f"{path} has budget and seed {min(twice, key=str)} more than once")
    return rows


def cells(rows: Sequence[Row], times: Mapping[str, Row], budget: float | None) -> list[str]:
    """The table's line of the same config and length with several seeds.

    With a budget, seconds, it says how much of that the training took.
    """
    first = rows[0]
    metrics = [
        spread([row["metrics"][key] * scale for row in rows], 3)
        for key, (_, scale) in METRICS.items()
        if key in first["metrics"]
    ]

    taken = training_of(first, times)
    share = "-" if taken is None or not budget else f"{taken / budget:.2f}"
    return [
        BACKBONES[backbone_of(first)],
        f"{first['parameters'] / 1e6:.2f}",
        ", ".join(str(row["seed"]) for row in rows),
        str(first["iterations"]),
        *metrics,
        seconds_of(times.get(first["config"])),
        seconds(taken),
        *([share] if budget else []),
        megabytes(max(row["peak_bytes"] for row in rows)),
    ]


def training_of(row: Row, times: Mapping[str, Row]) -> float | None:
    """Seconds of all iterations; None where they were not measured."""
    own = times.get(row["config"])
    return statistics.median(own["seconds"]) * row["iterations"] if own else None


def megabytes(count: int) -> str:
    """``-`` where it is not known, as of a run that was only tested again."""
    return f"{count / 1e6:.0f}" if count else "-"


def table(
    rows: Sequence[Row],
    key: Callable[[Row], Any],
    times: Mapping[str, Row],
    budget: float | None = None,
) -> str:
    """A Markdown table, a line for each config and length, in the order of ``key``."""
    lines: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (key(row), row["config"], row["seed"])):
        lines[row["config"], row["iterations"]].append(row)
    names = [name for k, (name, _) in METRICS.items() if k in rows[0]["metrics"]]
    header = ["backbone", "params (M)", "seeds", "iterations", *names]
    header += ["s/iteration", "training (s)", *(["of its time"] if budget else [])]
    header.append("peak memory (MB)")
    body = [cells(group, times, budget) for group in lines.values()]
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def of_equal_time(rows: Sequence[Row], times: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Rows of other lengths, each beside that of OURS whose time is nearest, which comes first.

    Raises:
        ValueError: the time of a row of another length was not measured.
    """
    scheduled = [row for row in rows if row["iterations"] == row["scheduled_iterations"]]
    groups = {
        ours: [row for row in scheduled if backbone_of(row) == ours]
        for ours in OURS
        if any(backbone_of(row) == ours and training_of(row, times) for row in scheduled)
    }
    budgets = {ours: training_of(group[0], times) or 1.0 for ours, group in groups.items()}
    for row in rows:
        if row["iterations"] != row["scheduled_iterations"]:
            if not budgets or (taken := training_of(row, times)) is None:
                raise ValueError(f"seconds of {row['config']} or of ours were not measured")
            groups[min(budgets, key=lambda ours: abs(math.log(taken / budgets[ours])))].append(row)
    return {
        ours: group
        for ours, group in groups.items()
        if any(row["iterations"] != row["scheduled_iterations"] for row in group)
    }


def where_table(rows: Sequence[Row]) -> str:
    """The measure by part of the data, a line for each config; of masks where there are some."""
    parts = rows[0]["where"]
    kind = next(kind for kind in ("segm", "bbox", "mIoU") if kind in parts["all"])
    header = ["backbone", "seeds"]
    for name, part in parts.items():
        objects = f", {part['objects']} objects" if "objects" in part else ""
        header.append(f"{name} ({part['images']} images{objects})")
    body = []
    for group in by_config(rows):
        seeds = ", ".join(str(row["seed"]) for row in group)
        values = [_spread_of_known([row["where"][part][kind] for row in group]) for part in parts]
        body.append([BACKBONES[backbone_of(group[0])], seeds, *values])
    align = ["left"] + ["right"] * (len(header) - 1)
    measure = dict(segm="mask AP", bbox="box AP", mIoU="mean IoU")[kind]
    by_size = any(part.endswith("inf") for part in parts)
    by = "the square root of an image's number of pixels" if by_size else "class"
    if "dark" in parts:
        by += f", and for images whose mean value is below and above {BRIGHT} of 255"
    head = WHERE.format(measure=measure, parts=by, more=ALL_COUNT if kind == "segm" else "")
    return head + tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def _spread_of_known(values: Sequence[float | None]) -> str:
    """Of parts without objects there is nothing to say."""
    known = [value for value in values if value is not None]
    return spread(known, 3) if known else "-"


def by_config(rows: Sequence[Row]) -> list[list[Row]]:
    """The seeds of each config, in the order of their parameters."""
    rows = sorted(rows, key=lambda row: (row["parameters"], row["config"], row["seed"]))
    return [list(group) for _, group in groupby(rows, lambda row: row["config"])]


def ahead(rows: Sequence[Row], ours: str) -> str:
    """Measures, of all data and of parts, in which every seed of others beats every one of ours."""
    groups = {backbone_of(group[0]): group for group in by_config(rows)}
    if (base := groups.get(ours)) is None:
        return ""
    found = []
    for name, other in groups.items():
        if name == ours:
            continue
        lines = []
        for measure in measures(base[0]):
            if not all(measure in measures(row) for row in (*base, *other)):
                continue
            own, others = ([measures(row)[measure] for row in group] for group in (base, other))
            if round(min(others), 3) > round(max(own), 3):
                lines.append(f"{measure} {spread(others, 3)}, here {spread(own, 3)}")
        if lines:
            found.append(f"- {BACKBONES[name]}: {'; '.join(lines)}")
    text = AHEAD + "\n".join(found) + "\n" if found else NOWHERE
    boxes = any("_mAP" in key for key in base[0]["metrics"])
    return text.format(ours=BACKBONES[ours], counts=COUNTS if boxes else "")


def measures(row: Row) -> dict[str, float]:
    """All that a row says of how right it is, by a name for people."""
    found = {
        name: row["metrics"][key] * scale
        for key, (name, scale) in METRICS.items()
        if key in row["metrics"]
    }
    names = dict(segm="mask AP", bbox="box AP", mIoU="mIoU")
    for key, value in row["metrics"].items():
        if (match := OF_OBJECTS.fullmatch(key)) and value >= 0:  # -1 where there are none
            found[f"{names[match['kind']]}{SUFFIXES[match['suffix']]}"] = value
    for part, figures in row.get("where", {}).items():
        if part != "all":
            known = {k: figures[k] for k in names if figures.get(k) is not None}
            found |= {f"{names[k]} of {part}": value for k, value in known.items()}
    return found


def across(rows: Sequence[Row], budgets: Sequence[Row]) -> str:
    """Mask AP by size of the image and budget of landmarks."""
    parts = [name for name in budgets[0] if name.startswith("segm ")]
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in budgets:
        lines[str(row["budget"])].append(row)
    body = []
    for most, group in lines.items():
        had = max(row["landmarks"] for row in group)
        values = [spread([row[part] for row in group], 3) for part in parts]
        body.append([most, ", ".join(str(row["seed"]) for row in group), str(had), *values])
    without = [row for row in rows if "no-attention" in row["config"] and "where" in row]
    if without:
        seeds = ", ".join(str(row["seed"]) for row in without)
        names = [part.removeprefix("segm ") for part in parts]
        values = [spread([row["where"][name]["segm"] for row in without], 3) for name in names]
        body.append(["trained without attention", seeds, "-", *values])
    header = ["landmarks at most", "seeds", "of 1024x1024", *parts]
    align = ["left"] + ["right"] * (len(header) - 1)
    head = ACROSS.format(sides=" ".join(map(str, SIDES)))
    return head + tabulate(body, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def of_largest(rows: Sequence[Row]) -> str:
    """Mask AP of one image, seed by seed: they differ too much for a mean."""
    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        lines[row["backbone"], str(row["budget"])].append(row)
    body = [
        [
            BACKBONES[backbone],
            most,
            ", ".join(str(row["landmarks"]) for row in group) if most != "-" else "-",
            ", ".join(f"{row['segm']:.3f}" for row in group),
        ]
        for (backbone, most), group in lines.items()
    ]
    header = ["backbone", "landmarks at most", "what it got", "mask AP"]
    align = ["left"] + ["right"] * (len(header) - 1)
    table = tabulate(body, header, "pipe", colalign=align, disable_numparse=True)
    return LARGEST_IMAGE + table + "\n"


def render(
    rows: Sequence[Row],
    times: Mapping[str, Row],
    budgets: Sequence[Row] = (),
    largest: Sequence[Row] = (),
) -> str:
    """The page."""
    text = HEAD + (conditions(rows) if rows else EMPTY)
    if times:
        text += f"\nTimes: commit {', '.join(sorted({of['commit'] for of in times.values()}))}.\n"
    if rows and all("wall_seconds" in row for row in rows):
        longest = max(row["wall_seconds"] for row in rows) / 60
        text += f"\nThe longest run took {longest:.0f} minutes, with its test, beside another.\n"
    for task, title in TASKS.items():
        own = [row for row in rows if task_of(row) == task]
        if not own:
            continue
        text += f"\n## {title}\n"
        scheduled = [row for row in own if row["iterations"] == row["scheduled_iterations"]]
        if scheduled:
            text += "\n" + table(scheduled, lambda row: row["parameters"], times)
        for ours, group in of_equal_time(own, times).items():
            budget = training_of(group[0], times)
            text += EQUAL_TIME.format(ours=BACKBONES[ours])
            text += table(group, lambda row: row["parameters"], times, budget)
        known = [row for row in scheduled if "where" in row]
        if known:
            text += where_table(known)
        text += "".join(ahead(scheduled, ours) for ours in OURS)
        if budgets and task == ("nuclei", "mask-rcnn"):
            text += across(scheduled, budgets)
            text += of_largest(largest) if largest else ""
        name, shown, seen = PICTURES[task]
        if (ROWS / name).is_file():
            text += f"\n![{shown}](real_data/{name})\n{SHEET}{seen}\n"
        name, peer, seen = BEHIND[task]
        if (ROWS / name).is_file():
            title = f"Three images on which {peer} is furthest ahead of SOFT++ mini"
            text += f"\n![{title}](real_data/{name})\n\n{title}, seed 0. {seen}\n"
        name, shown, seen = IMAGES.get(task, ("", "", ""))
        if (ROWS / name).is_file():
            text += f"\n![{shown}](real_data/{name})\n\n{seen}\n"
    if any("loss" in row for row in rows):
        shown = "Training loss of every run of a whole schedule, means of 40 iterations"
        text += f"\n## Learning\n\n![{shown}](real_data/{FIGURE.name})\n"
    return text


def smooth(curve: Sequence[Sequence[float]], entries: int = 4) -> list[list[float]]:
    """The means of so many entries of the log, at the last one's iteration; not of fewer."""
    parts = [curve[n : n + entries] for n in range(0, len(curve) - entries + 1, entries)]
    return [[part[-1][0], statistics.mean(loss for _, loss in part)] for part in parts]


def draw(rows: Sequence[Row], path: Path) -> None:
    """The training loss of all scheduled runs; of rows older than the figure it is not known."""
    from mmsoft.visualization import draw_learning, save_figure

    runs: dict[str, dict[str, dict[str, list]]] = {}
    for row in sorted(rows, key=lambda row: (list(TASKS).index(task_of(row)), row["parameters"])):
        if "loss" in row and row["iterations"] == row["scheduled_iterations"]:
            lines = runs.setdefault(TASKS[task_of(row)], {})
            curves = lines.setdefault(BACKBONES[backbone_of(row)], dict(loss=[]))["loss"]
            curves.append(smooth(row["loss"]))
    if runs:
        save_figure(draw_learning(runs), path, colours=64)


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("run", help="train and test one row")
    row.add_argument("config", type=Path, help="of configs/nuclei/ or configs/bccd/")
    row.add_argument("--seed", type=int, default=0)
    row.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    row.add_argument("--iters", type=int, help="instead of the config's (the row's name says so)")
    row.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    turns = commands.add_parser("time", help="train configs in turns and time their iterations")
    turns.add_argument("configs", type=Path, nargs="+", help="of one task, ours first")
    turns.add_argument("--work-dir", type=Path, required=True, help="a new folder, for the logs")
    turns.add_argument("--rounds", type=int, default=3)
    turns.add_argument("--iters", type=int, default=12, help=f"of each run, over {WARM_UP}")
    turns.add_argument("--out", type=Path, default=TIMES, help="folder of the times")
    sheet = commands.add_parser("draw", help="paint what runs found beside the truth")
    sheet.add_argument("runs", type=Path, nargs="+", help="work dirs of one task's `run`s")
    sheet.add_argument("--number", type=int, default=6, help="of images, best to worst")
    sheet.add_argument("--image", nargs="+", default=[], help="these instead, without suffix")
    sheet.add_argument(
        "--behind", action="store_true", help="where the second run is furthest ahead of the first"
    )
    sheet.add_argument("--width", type=float, default=7.2, help="inches, of 100 pixels each")
    sheet.add_argument("--out", type=Path, required=True)
    page = commands.add_parser("table", help="write docs/real_data.md")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    args = parser.parse_args()
    try:
        if args.command in ("run", "time") and args.work_dir.exists():
            sys.exit(f"error: {args.work_dir} exists; name a new folder")
        if args.command == "draw":
            if args.behind and len(args.runs) < 2:
                sys.exit("error: --behind compares two runs")
            paint(args.runs, args.number, args.image, args.width, args.out, args.behind)
            return
        if args.command == "time":
            time_configs(args.configs, args.work_dir, args.out, args.rounds, args.iters)
            return
        if args.command == "run":
            print(run(args.config, args.seed, args.work_dir, args.iters, args.out))
            return
        rows = read(ROWS)
        largest = json.loads(LARGEST.read_text()) if LARGEST.is_file() else []
        text = render(rows, times_by_config(TIMES), read_budgets(BUDGETS), largest)
    except (CommandError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("stale: docs/real_data.md; run python tools/dev/real_data.py table")
        print("current")
        return
    draw(rows, FIGURE)
    with write_whole(PAGE) as partial:
        partial.write_text(text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
