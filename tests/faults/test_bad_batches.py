"""Batches that could make the weights NaN, through the real runner."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from fault_runs import config, train, weights_are_finite
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

import mmsoft.models  # noqa: F401

for library in ("mmdet", "mmseg"):
    pytest.importorskip(library)
pytestmark = pytest.mark.runner

GUARD = [dict(type="mmsoft.FiniteGradientHook")]
OFFENDING = "00000002.jpg"  # in the first batch of every data set, second in it


@TRANSFORMS.register_module()
class CollapseBox:
    """Give the first box of the second image no area, as a crop or a rotation may."""

    def __call__(self, results):
        if results["img_path"].endswith(OFFENDING):
            boxes = results["gt_bboxes"].tensor
            boxes[0, 2:] = boxes[0, :2]
        return results


@TRANSFORMS.register_module()
class IgnoreAll:
    """Label every pixel as ignored, as in a crop of an unlabelled region."""

    def __call__(self, results):
        results["gt_seg_map"][:] = 255
        return results


def insert(config, transform):
    pipeline = config.train_dataloader.dataset.pipeline
    pipeline.insert(len(pipeline) - 1, dict(type=transform))


def offending_files(folder):
    return [
        *folder.glob(f"data/shapes/coco/train2017/*{OFFENDING}"),
        *folder.glob(f"data/shapes/ade/images/training/*{OFFENDING}"),
    ]


def save_all(folder, image, suffix):
    data = cv2.imencode(suffix, image)[1].tobytes()  # readers look at the content, not the name
    for path in offending_files(folder):
        path.write_bytes(data)


def nan_pixel(folder, config):
    image = np.full((64, 64, 3), 100, np.float32)
    image[20, 30] = np.nan
    save_all(folder, image, ".tiff")
    config.train_dataloader.dataset.pipeline[0].color_type = "unchanged"


def one_colour(folder, config):
    save_all(folder, np.full((64, 64, 3), 128, np.uint8), ".jpg")


def no_objects(folder, config):
    path = folder / "data/shapes/coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 4]
    path.write_text(json.dumps(content))


def no_area(folder, config):
    insert(config, "CollapseBox")


def ignored(folder, config):
    insert(config, "IgnoreAll")


DETECTORS, SEGMENTORS = ["retinanet", "mask_rcnn"], ["upernet"]
CASES = [
    *[(nan_pixel, name, "pixels in") for name in DETECTORS + SEGMENTORS],
    *[(one_colour, name, None) for name in DETECTORS + SEGMENTORS],
    *[(no_objects, name, None) for name in DETECTORS],
    (no_area, "retinanet", None),
    (no_area, "mask_rcnn", "samples are"),
    (ignored, "upernet", None),
]


@pytest.fixture
def folder(shapes, tmp_path):
    shutil.copytree(shapes / "data", tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "model", "message"), CASES, ids=lambda v: getattr(v, "__name__", None)
)
def test_training_continues_or_names_the_sample(fault, model, message, root, folder):
    cfg = config(root, folder, model, folder / "work", iterations=3)
    cfg.custom_hooks = GUARD
    fault(folder, cfg)
    if message is None:
        runner, losses = train(cfg)
        assert len(losses) == 3
        assert np.isfinite(losses).all()
    else:
        runner = Runner.from_cfg(cfg)
        with pytest.raises(FloatingPointError, match=rf"iteration 1 .*{message} .*{OFFENDING}"):
            runner.train()
    assert weights_are_finite(runner)
    assert all(buffer.isfinite().all() for buffer in runner.model.buffers())


def test_without_the_hook_the_weights_become_nan(root, folder):
    cfg = config(root, folder, "retinanet", folder / "work", iterations=2)
    nan_pixel(folder, cfg)
    runner, _ = train(cfg)
    assert not weights_are_finite(runner)


def test_accumulated_gradients_name_every_sample(root, folder):
    cfg = config(root, folder, "retinanet", folder / "work", iterations=4)
    cfg.custom_hooks = GUARD
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.train_dataloader.batch_size = 1
    runner = Runner.from_cfg(cfg)
    weight = runner.model.backbone.stages[1].pos_embed
    once = weight.register_hook(lambda gradient: (once.remove(), gradient / 0)[1])
    what = r"iteration 2 the gradient is not finite in \d+ parameters, among them backbone\S*"
    with pytest.raises(FloatingPointError, match=rf"{what}; .*00000001.jpg, .*{OFFENDING}"):
        runner.train()
    assert weights_are_finite(runner)


def test_a_nan_loss_with_finite_gradients_stops_the_run(root, folder):
    """A gradient scaler skips the steps of a NaN loss, so that no gradient check would see it."""
    cfg = config(root, folder, "retinanet", folder / "work", iterations=2)
    cfg.custom_hooks = GUARD
    runner = Runner.from_cfg(cfg)
    train_step = runner.model.train_step
    runner.model.train_step = lambda *args, **kwargs: {
        **train_step(*args, **kwargs),
        "loss_cls": torch.tensor(float("nan")),
    }
    with pytest.raises(FloatingPointError, match=rf"loss_cls is nan; the samples .*{OFFENDING}"):
        runner.train()
