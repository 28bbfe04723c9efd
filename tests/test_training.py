"""Training through the real runner: generated data, checkpoint, resume, evaluation."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ITERATIONS = 3  # an epoch of 12 images in batches of 4
SHRINK = ["train_dataloader.batch_size=4", "default_hooks.logger.interval=1"]
CASES = {
    "mmdet": (
        "retinanet_softpp-mini_fpn_shapes.py",
        ["train_cfg.max_epochs={epochs}", "train_cfg.val_interval=2"],
        # An untrained detector is sure of nothing, and without detections there is no metric.
        # With so few iterations the cosine must not fall faster than the warm-up grows.
        [
            "default_hooks.checkpoint.interval=1",
            "model.test_cfg.score_thr=0",
            "param_scheduler.1.end=100",
        ],
        "epoch_{epochs}.pth",
        "coco/bbox_mAP",
    ),
    "mmseg": (
        "upernet_softpp-mini_shapes.py",
        ["train_cfg.max_iters={iterations}", f"train_cfg.val_interval={2 * ITERATIONS}"],
        [f"default_hooks.checkpoint.interval={ITERATIONS}"],
        "iter_{iterations}.pth",
        "mIoU",
    ),
}


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """A folder with the data where the configs look for them."""
    folder = tmp_path_factory.mktemp("training")
    script = root / "tools/dataset_converters/make_shapes.py"
    sizes = ["--train", "12", "--val", "4", "--size", "64"]
    subprocess.run([sys.executable, str(script), "data/shapes", *sizes], cwd=folder, check=True)
    return folder


def read_scalars(work_dir):
    """What the latest run in `work_dir` logged: training entries and validation entries."""
    text = max(work_dir.glob("*/vis_data/scalars.json")).read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    return [e for e in entries if "loss" in e], [e for e in entries if "loss" not in e]


@pytest.mark.parametrize("package", CASES)
def test_train_checkpoint_resume_evaluate(package, root, folder):
    pytest.importorskip(package)
    config, length, options, checkpoint, metric = CASES[package]
    work_dir = folder / package

    def train(epochs, *flags):
        sizes = dict(epochs=epochs, iterations=epochs * ITERATIONS)
        script = Path(find_spec(package).origin).parent / ".mim/tools/train.py"  # as mim does
        command = [sys.executable, str(script), str(root / "configs/demo" / config), *flags]
        command += ["--work-dir", str(work_dir), "--cfg-options", *SHRINK, *options]
        command += [option.format(**sizes) for option in length]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert (work_dir / checkpoint.format(**sizes)).is_file()
        return read_scalars(work_dir)

    first, _ = train(1)
    assert [entry["iter"] for entry in first] == [1, 2, 3]

    resumed, scores = train(2, "--resume")
    assert [entry["iter"] for entry in resumed] == [4, 5, 6]
    # The schedule continued too: still warming up, the rate grows from entry to entry.
    rates = [entry["lr"] for entry in first + resumed]
    assert rates == sorted(set(rates))

    losses = [value for entry in first + resumed for name, value in entry.items() if "loss" in name]
    assert all(math.isfinite(value) for value in losses)
    assert len(scores) == 1
    assert 0 <= scores[0][metric] <= 100
