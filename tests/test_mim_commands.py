"""The commands of mim on full-size configs, over data sets in their true layout."""

import json
import math
import subprocess
import sys

import cv2
import pytest
from true_layout import make_ade20k, make_coco, make_imagenet

SMALL_COCO = [
    "train_dataloader.dataset.pipeline.2.scale=(160,96)",
    "test_dataloader.dataset.pipeline.1.scale=(160,96)",
    "val_dataloader.dataset.pipeline.1.scale=(160,96)",
    "train_dataloader.dataset.filter_cfg.min_size=1",
]
# `length` is the option that sets the length, `lengths` its values in training and on resuming.
FAMILIES = {
    "retinanet": dict(
        package="mmdet",
        config="retinanet/retinanet_softpp-t_fpn_1x_coco.py",
        data=make_coco,
        # An untrained detector is sure of nothing, and without detections there is no metric.
        options=[*SMALL_COCO, "model.test_cfg.score_thr=0"],
        length="train_cfg.max_epochs={}",
        lengths=(1, 2),
        checkpoint="epoch_{}.pth",
        metric="coco/bbox_mAP",
        scale_lr=["--auto-scale-lr"],
        base_batch_size=16,
    ),
    "mask_rcnn": dict(
        package="mmdet",
        config="mask_rcnn/mask-rcnn_softpp-t_fpn_1x_coco.py",
        data=make_coco,
        options=[
            *SMALL_COCO,
            "model.test_cfg.rcnn.score_thr=0",
            # Fewer regions: mmcv's RoIAlign is slow on a CPU.
            "model.train_cfg.rcnn.sampler.num=16",
            "model.test_cfg.rpn.max_per_img=16",
        ],
        length="train_cfg.max_epochs={}",
        lengths=(1, 2),
        checkpoint="epoch_{}.pth",
        metric="coco/segm_mAP",
        scale_lr=["--auto-scale-lr"],
        base_batch_size=16,
    ),
    "upernet": dict(
        package="mmseg",
        config="upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py",
        data=make_ade20k,
        options=[
            "train_dataloader.dataset.pipeline.2.scale=(256,96)",
            "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
            "model.data_preprocessor.size=(64,64)",
            "val_dataloader.dataset.pipeline.1.scale=(256,64)",
            "test_dataloader.dataset.pipeline.1.scale=(256,64)",
            "default_hooks.checkpoint.interval=2",
        ],
        length="train_cfg.max_iters={}",
        lengths=(2, 4),
        checkpoint="iter_{}.pth",
        metric="mIoU",
        # mmseg's train.py has no --auto-scale-lr and its bases no entry; MMEngine obeys one.
        scale_lr=["auto_scale_lr.enable=True", "auto_scale_lr.base_batch_size=16"],
        base_batch_size=16,
    ),
    "imagenet": dict(
        package="mmpretrain",
        config="soft/softpp-tiny_8xb128_in1k.py",
        data=make_imagenet,
        options=[
            "train_dataloader.batch_size=2",
            "train_dataloader.dataset.indices=4",
            "param_scheduler.1.begin=0",  # of 10: a cosine that begins after the end is refused
            "val_dataloader.dataset.indices=2",
            "test_dataloader.dataset.indices=2",
        ],
        length="train_cfg.max_epochs={}",
        lengths=(1, 2),
        checkpoint="epoch_{}.pth",
        metric="accuracy/top1",
        scale_lr=["--auto-scale-lr"],
        base_batch_size=1024,
    ),
}
ALIASES = {"mmseg": "mmsegmentation"}  # the names by which mim knows the package


def mim(folder, *arguments):
    """Run mim in `folder` and give what it printed; fail with that if it fails."""
    command = [sys.executable, "-m", "mim", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{output[-4000:]}"
    return output


def scalars(work_dir):
    """What the latest run in `work_dir` logged of its iterations."""
    text = max(work_dir.glob("*/vis_data/scalars.json")).read_text()
    return [entry for entry in map(json.loads, text.splitlines()) if "loss" in entry]


def is_painted(file):
    """Whether `file` is a picture with something on it."""
    picture = cv2.imread(str(file))
    return picture is not None and picture.std() > 5


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_config_trains_resumes_and_tests(family, root, tmp_path):
    case = FAMILIES[family]
    package = case["package"]
    pytest.importorskip(package)
    case["data"](tmp_path)
    config = root / "configs" / case["config"]
    options = [*case["options"], "default_hooks.logger.interval=1"]

    def train(length, *flags):
        name = ALIASES.get(package, package) if "--resume" in flags else package
        flags = [*flags, "--gpus", 0, "--work-dir", "work"]
        changes = [*options, case["length"].format(length)]
        # One begins with "--", the other is a change of the config.
        (flags if case["scale_lr"][0].startswith("--") else changes).extend(case["scale_lr"])
        output = mim(tmp_path, "train", name, config, *flags, "--cfg-options", *changes)
        assert (tmp_path / "work" / case["checkpoint"].format(length)).is_file()
        return output, scalars(tmp_path / "work")

    output, first = train(case["lengths"][0])
    assert [entry["iter"] for entry in first] == [1, 2]
    scaling = f"batch size of {case['base_batch_size']} and the current batch size is 2"
    assert scaling in output
    output, resumed = train(case["lengths"][1], "--resume")
    assert f"resumed epoch: {case['lengths'][0] if 'epochs' in case['length'] else 0}" in output
    assert [entry["iter"] for entry in resumed] == [3, 4]
    losses = [v for entry in first + resumed for k, v in entry.items() if "loss" in k]
    assert all(math.isfinite(loss) for loss in losses)

    checkpoint = f"work/{case['checkpoint'].format(case['lengths'][1])}"
    tests = [option for option in options if not option.startswith(("train_", "val_"))]
    common = ["--gpus", 0, "--work-dir", "test", "--cfg-options", *tests]
    output = mim(tmp_path, "test", package, config, "--checkpoint", checkpoint, *common)
    (report,) = (tmp_path / "test").glob("*/*.json")
    assert 0 <= json.loads(report.read_text())[case["metric"]] <= 100
    assert f"Load checkpoint from {checkpoint}" in output

    plot = [] if package == "mmseg" else ["plot_curve"]  # the one script knows no sub-commands
    log = max((tmp_path / "work").glob("*/vis_data/scalars.json"))
    mim(tmp_path, "run", package, "analyze_logs", *plot, log, "--keys", "loss", "--out", "loss.png")
    assert is_painted(tmp_path / "loss.png")


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_print_config(family, root, tmp_path):
    case = FAMILIES[family]
    pytest.importorskip(case["package"])
    config = root / "configs" / case["config"]
    output = mim(tmp_path, "run", case["package"], "print_config", config)
    assert "type='mmsoft.SOFTPlusPlus'" in output
    assert "train_dataloader = dict(" in output


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_browse_dataset(family, root, tmp_path):
    case = FAMILIES[family]
    package = case["package"]
    pytest.importorskip(package)
    case["data"](tmp_path)
    config = root / "configs" / case["config"]
    options = [option for option in case["options"] if option.startswith("train_")]
    flags = ["--output-dir", "painted", "--not-show", "--cfg-options", *options]
    if package == "mmseg":  # whose own fails
        script = root / "tools/analysis_tools/browse_seg_dataset.py"
        command = [sys.executable, str(script), str(config), *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        mim(tmp_path, "run", package, "browse_dataset", config, *flags)
    pictures = [*(tmp_path / "painted").rglob("*.jpg"), *(tmp_path / "painted").rglob("*.JPEG")]
    assert len(pictures) == 4
    assert all(is_painted(picture) for picture in pictures)
