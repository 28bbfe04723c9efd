"""The commands of mim, on small data sets in their usual layout.

Training, resuming and testing with one config of each library among the quick tests, and with every
full-size family among the long ones.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
from true_layout import make_ade20k, make_coco, make_demo_data, make_imagenet

# The scores of an untrained detector are low, and without detections there is no metric.
ALL_BOXES = ["model.test_cfg.score_thr=0"]
SMALL_COCO = [
    "train_dataloader.dataset.pipeline.2.scale=(160,96)",
    "test_dataloader.dataset.pipeline.1.scale=(160,96)",
    "val_dataloader.dataset.pipeline.1.scale=(160,96)",
    "train_dataloader.dataset.filter_cfg.min_size=1",
]
BOXES = ["val_evaluator.outfile_prefix=val", "test_evaluator.outfile_prefix=test"]
MAPS = ["val_evaluator.output_dir=val", "test_evaluator.output_dir=test"]
# Of each library: the option that sets the length, its values in training and on resuming, the
# checkpoint, and how the learning rate is scaled (mmseg's train.py has no --auto-scale-lr and its
# bases no entry, but MMEngine accepts one).
EPOCHS = dict(
    length="train_cfg.max_epochs={}",
    lengths=(1, 2),
    checkpoint="epoch_{}.pth",
    scale_lr=["--auto-scale-lr"],
)
ITERATIONS = dict(
    length="train_cfg.max_iters={}",
    lengths=(2, 4),
    iterations=1,
    checkpoint="iter_{}.pth",
    scale_lr=["auto_scale_lr.enable=True", "auto_scale_lr.base_batch_size=16"],
    metric="mIoU",
)
# `iterations` are those of one unit of length; `batch_sizes` ours here and that of the recipe.
FAMILIES = {
    "shapes-retinanet": dict(
        EPOCHS,
        package="mmdet",
        config="demo/retinanet_softpp-mini_fpn_shapes.py",
        data=make_demo_data,
        # With so few iterations the cosine must not fall faster than the warm-up grows.
        options=[*ALL_BOXES, *BOXES, "param_scheduler.1.end=100"],
        iterations=3,
        metric="coco/bbox_mAP_50",
        batch_sizes=(4, 16),
    ),
    "shapes-upernet": dict(
        ITERATIONS,
        package="mmseg",
        config="demo/upernet_softpp-mini_shapes.py",
        data=make_demo_data,
        options=MAPS,
        lengths=(3, 6),
        batch_sizes=(4, 16),
    ),
    "imagenet": dict(
        EPOCHS,
        package="mmpretrain",
        config="soft/softpp-tiny_8xb128_in1k.py",
        data=make_imagenet,
        options=[
            "train_dataloader.batch_size=4",
            "train_dataloader.dataset.indices=4",
            "val_dataloader.dataset.indices=4",
            "test_dataloader.dataset.indices=4",
            "train_dataloader.dataset.pipeline.1.scale=64",
            *(
                f"{split}_dataloader.dataset.pipeline.{step}=64"
                for split in ("val", "test")
                for step in ("1.scale", "2.crop_size")
            ),
            "train_cfg.val_interval=100",  # and at the end
            "default_hooks.checkpoint.interval=100",
            "optim_wrapper.optimizer.lr=0.256",  # 1e-3 when scaled
            # The first step changes next to nothing: an average that kept to it would be seen.
            "param_scheduler.0.start_factor=0.01",
            "param_scheduler.1.end=100",  # a cosine that begins after the end is refused
        ],
        lengths=(1, 8),
        iterations=1,
        metric="accuracy/top5",
        batch_sizes=(4, 1024),
    ),
    "retinanet": dict(
        EPOCHS,
        package="mmdet",
        config="retinanet/retinanet_softpp-t_fpn_1x_coco.py",
        data=make_coco,
        options=[*SMALL_COCO, *ALL_BOXES, *BOXES],
        iterations=2,
        metric="coco/bbox_mAP",
        batch_sizes=(2, 16),
    ),
    "mask_rcnn": dict(
        EPOCHS,
        package="mmdet",
        config="mask_rcnn/mask-rcnn_softpp-t_fpn_1x_coco.py",
        data=make_coco,
        options=[
            *SMALL_COCO,
            *BOXES,
            "model.test_cfg.rcnn.score_thr=0",
            # Fewer regions: mmcv's RoIAlign is slow on a CPU.
            "model.train_cfg.rcnn.sampler.num=16",
            "model.test_cfg.rpn.max_per_img=16",
        ],
        iterations=2,
        metric="coco/segm_mAP",
        batch_sizes=(2, 16),
    ),
    "upernet": dict(
        ITERATIONS,
        package="mmseg",
        config="upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py",
        data=make_ade20k,
        options=[
            *MAPS,
            "train_dataloader.dataset.pipeline.2.scale=(256,96)",
            "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
            "model.data_preprocessor.size=(64,64)",
            "val_dataloader.dataset.pipeline.1.scale=(256,64)",
            "test_dataloader.dataset.pipeline.1.scale=(256,64)",
            "param_scheduler.0.start_factor=0.5",  # else nothing is learnt within 4 iterations
        ],
        batch_sizes=(2, 16),
    ),
}
QUICK = ("shapes-upernet",)  # test_downstream trains two detectors, datasets/ classifiers
FULL_SIZE = ("imagenet", "retinanet", "mask_rcnn", "upernet")
ALIASES = {"mmseg": "mmsegmentation"}  # the names by which mim knows the package


@pytest.fixture
def mim(run_outside):
    """Run mim, or another program, and give what it printed; fail with that if it fails."""

    def mim(*arguments, program=("-m", "mim")):
        done = run_outside(*program, *arguments)
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{arguments}\n{output[-4000:]}"
        return output

    return mim


def scalars(work_dir):
    """What the latest run in `work_dir` logged: entries of training, and of validation."""
    text = max(work_dir.glob("*/vis_data/scalars.json")).read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    return [e for e in entries if "loss" in e], [e for e in entries if "loss" not in e]


def predictions(folder, split):
    """Every file of detections, or of label maps, that an evaluator wrote."""
    files = [*folder.glob(f"{split}.*.json"), *folder.glob(f"{split}/*.png")]
    return {file.name.removeprefix(split): file.read_bytes() for file in files}


def is_painted(file):
    """Whether `file` is a picture with something on it."""
    picture = cv2.imread(str(file))
    return picture is not None and picture.std() > 5


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.long]) for f in FAMILIES]
)
def test_config_trains_resumes_and_tests(family, root, tmp_path, mim):
    case = FAMILIES[family]
    package = case["package"]
    pytest.importorskip(package)
    case["data"](tmp_path)
    config = root / "configs" / case["config"]
    work = tmp_path / "work"

    def train(length, *flags):
        flags = [*flags, "--work-dir", "work"]
        changes = [*case["options"], "default_hooks.logger.interval=1"]
        changes.append(case["length"].format(length))
        # One begins with "--", the other is a change of the config.
        (flags if case["scale_lr"][0].startswith("--") else changes).extend(case["scale_lr"])
        changes = ["--cfg-options", *changes]
        if "--resume" in flags and family in QUICK:  # the script that mim starts, and starts twice
            script = Path(find_spec(package).origin).parent / ".mim/tools/train.py"
            output = mim(config, *flags, *changes, program=[script])
        else:
            output = mim("train", package, config, "--gpus", 0, *flags, *changes)
        assert (work / case["checkpoint"].format(length)).is_file()
        return output, *scalars(work)

    start, end = case["lengths"]
    output, first, (first_scores,) = train(start)
    assert "do not normalize" not in output  # GroupNorm, or BatchNorm that learns
    assert [entry["iter"] for entry in first] == [*range(1, start * case["iterations"] + 1)]
    own, base = case["batch_sizes"]
    assert f"batch size of {base} and the current batch size is {own}" in output
    first_predictions = predictions(tmp_path, "val")
    output, resumed, (*_, scores) = train(end, "--resume")
    assert f"resumed epoch: {start if 'epochs' in case['length'] else 0}" in output
    assert resumed[0]["iter"] == first[-1]["iter"] + 1
    assert resumed[-1]["iter"] == end * case["iterations"]
    # The schedule continued too: still warming up, the rate grows from entry to entry.
    rates = [entry["lr"] for entry in first + resumed]
    assert rates == sorted(set(rates))
    losses = [v for entry in first + resumed for k, v in entry.items() if "loss" in k]
    assert all(math.isfinite(loss) for loss in losses)

    # With the config that training wrote, which has the options of its command line.
    checkpoint = f"work/{case['checkpoint'].format(end)}"
    common = ["--checkpoint", checkpoint, "--gpus", 0, "--work-dir", "test"]
    output = mim("test", ALIASES.get(package, package), work / config.name, *common)
    assert f"Load checkpoint from {checkpoint}" in output
    (report,) = (tmp_path / "test").glob("*/*.json")
    tested = {k: v for k, v in json.loads(report.read_text()).items() if "time" not in k}
    # The same numbers as the last validation's, from the same predictions, which training changed.
    assert tested == {k: v for k, v in scores.items() if k in tested}
    assert case["metric"] in tested
    assert predictions(tmp_path, "test") == predictions(tmp_path, "val")
    if package == "mmpretrain":  # whose evaluators write none
        assert first_scores["accuracy/top5"] < tested["accuracy/top5"]
    else:
        assert predictions(tmp_path, "val").keys() == first_predictions.keys() != set()
        assert predictions(tmp_path, "val") != first_predictions
        # The full-size detectors find none of 80 classes within 4 iterations.
        assert tested[case["metric"]] > 0 or family in ("retinanet", "mask_rcnn")


@pytest.mark.long
@pytest.mark.parametrize("package", ["mmdet", "mmseg", "mmpretrain"])
def test_analyze_logs(package, tmp_path, mim):
    pytest.importorskip(package)
    entries = [dict(loss=1 / i, lr=0.1, epoch=1, iter=i, step=i) for i in range(1, 5)]
    (tmp_path / "scalars.json").write_text("\n".join(map(json.dumps, entries)) + "\n")
    plot = [] if package == "mmseg" else ["plot_curve"]  # mmseg's script has no subcommands
    flags = ["--keys", "loss", "--out", "loss.png"]
    mim("run", package, "analyze_logs", *plot, "scalars.json", *flags)
    assert is_painted(tmp_path / "loss.png")


@pytest.mark.long
@pytest.mark.parametrize("family", FULL_SIZE)
def test_print_config(family, root, mim):
    case = FAMILIES[family]
    pytest.importorskip(case["package"])
    config = root / "configs" / case["config"]
    output = mim("run", case["package"], "print_config", config)
    assert "type='mmsoft.SOFTPlusPlus'" in output
    assert "train_dataloader = dict(" in output


@pytest.mark.long
@pytest.mark.parametrize("family", FULL_SIZE)
def test_browse_dataset(family, root, tmp_path, mim):
    case = FAMILIES[family]
    package = case["package"]
    pytest.importorskip(package)
    case["data"](tmp_path)
    config = root / "configs" / case["config"]
    options = [option for option in case["options"] if option.startswith("train_")]
    flags = ["--output-dir", "painted", "--not-show", "--cfg-options", *options]
    if package == "mmseg":  # whose own script fails
        mim(config, *flags, program=[root / "tools/analysis_tools/browse_seg_dataset.py"])
    else:
        mim("run", package, "browse_dataset", config, *flags)
    pictures = [*(tmp_path / "painted").rglob("*.jpg"), *(tmp_path / "painted").rglob("*.JPEG")]
    assert len(pictures) == 4
    assert all(is_painted(picture) for picture in pictures)
