"""The demo: configs, pictures, errors. `make demo` runs it."""

import json
import re
import shlex

import cv2
import numpy as np
import pytest
from loading import load_tool
from mmengine.config import Config
from true_layout import make_demo_data

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
encode = pytest.importorskip("pycocotools.mask").encode


@pytest.fixture(scope="module")
def demo():
    return load_tool("demo.py")


@pytest.fixture
def workplace(demo, root, tmp_path, monkeypatch):
    """Another root with data and configs, so that nothing is written to the repository."""
    make_demo_data(tmp_path, train=1, val=3)
    (tmp_path / "configs").symlink_to(root / "configs")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", [0, 1])
def test_variants_differ_in_their_backbone(demo, root, index):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    types = []
    for variant in demo.VARIANTS:
        path = root / demo.tasks(variant)[index].config
        types.append(Config.fromfile(path, import_custom_modules=False).model.backbone.type)
    assert types[:2] == ["mmsoft.SOFTPlusPlus", "mmsoft.SOFTPlusPlusNoAttention"]
    assert types[2].removeprefix("mmdet.") == "PyramidVisionTransformer"


def test_no_attention_leaves_the_value_convolution(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "tools/analysis_tools")
    from no_attention import SOFTPlusPlusNoAttention

    from mmsoft.models.attention import SoftmaxFreeAttention

    arch = dict(embed_dims=[32] * 4, depths=[1] * 4, num_heads=[1] * 4)
    model = SOFTPlusPlusNoAttention(arch)
    layers = [m for m in model.modules() if isinstance(m, SoftmaxFreeAttention)]
    assert len(layers) == 3
    x = torch.randn(1, 64, 32)
    expected = layers[0].proj(layers[0].convolve_values(layers[0].value(x), (8, 8)))
    torch.testing.assert_close(layers[0](x, (8, 8)), expected)


def test_pictures_are_written(demo, workplace):
    mmengine = pytest.importorskip("mmengine")
    pytest.importorskip("mmseg")
    work_dir = workplace / "work_dirs/demo"
    detection, segmentation = demo.tasks(demo.VARIANTS[0])
    for task, unit in ((detection, "epoch"), (segmentation, "iter")):
        folder = task.folder(work_dir) / "20260101_000000/vis_data"
        folder.mkdir(parents=True)
        entries = [{"loss": 2 / i, "loss_cls": 1 / i, "iter": i, "step": i} for i in range(1, 5)]
        entries.append(
            dict.fromkeys(task.metrics.values(), 0.5 / task.scale) | {unit: 4, "step": 4}
        )
        (folder / "scalars.json").write_text("\n".join(map(json.dumps, entries)))
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[10:30, 5:20] = 1
    instances = dict(
        bboxes=torch.tensor([[5.0, 5, 20, 30], [30, 10, 50, 60]]),
        labels=torch.tensor([0, 4]),
        scores=torch.tensor([0.9, 0.1]),
        masks=[encode(mask)] * 2,
    )
    nothing = {name: values[:0] for name, values in instances.items()}
    found = {1: instances, 2: nothing, 3: instances}
    results = [dict(img_id=i, pred_instances=found[i]) for i in (3, 1, 2)]
    mmengine.dump(results, detection.folder(work_dir) / detection.out)
    maps = segmentation.folder(work_dir) / segmentation.out
    maps.mkdir()
    for path in (workplace / "data/shapes/ade/annotations/validation").iterdir():
        cv2.imwrite(str(maps / path.name), np.full((64, 64), 3, np.uint8))

    demo.paint_curves([detection, segmentation], work_dir)
    demo.paint_predictions([detection, segmentation], work_dir)
    pictures = {p.name: cv2.imread(str(p)) for p in (work_dir / "predictions").iterdir()}
    pictures["curves"] = cv2.imread(str(work_dir / "loss_curves.png"))
    assert len(pictures) == 2 * (3 + 1) + 1
    for name, picture in pictures.items():
        assert picture.std() > 10
        if name != "curves":  # image, ground truth and prediction, of 64 x 64 pixels
            assert picture.shape == (192 * (3 if "overview" in name else 1), 3 * 192, 3)
    predicted = pictures["detection_01.png"][:, 384:].astype(int)
    assert np.ptp(predicted[50:80, 20:55], -1).min() > 20  # the mask
    assert np.ptp(predicted[40:170, 140:160], -1).max() == 0  # a box of low score is not drawn
    assert np.ptp(pictures["detection_02.png"][:, 384:].astype(int), -1).max() == 0
    blue, _, red = pictures["segmentation_01.png"][:, 384:].reshape(-1, 3).mean(0)
    assert blue > red + 40  # the colour of bars


def test_summary_has_the_metrics_of_the_tests(demo, workplace, monkeypatch):
    measured = {"coco/bbox_mAP": 0.61, "coco/segm_mAP": 0.52, "mIoU": 77.0}
    commands = []

    def mim(title, arguments, log, folder):
        commands.append(arguments[:3])
        (log.parent / "last_checkpoint").write_text(str(log.parent / "last.pth"))
        run = log.parent / f"2026010{len(commands)}_000000"
        run.mkdir()
        # A validation while training, then the test, whose metrics count.
        scale = 0.5 if arguments[0] == "train" else 1
        text = json.dumps({name: scale * value for name, value in measured.items()})
        (run / f"{run.name}.json").write_text(text)

    monkeypatch.setattr("mmsoft.commands.mim", mim)
    monkeypatch.setattr(demo, "make_data", lambda: None)
    monkeypatch.setattr(demo, "paint_curves", lambda *_: None)
    monkeypatch.setattr(demo, "paint_predictions", lambda *_: None)
    demo.demo(demo.VARIANTS[0])
    summary = json.loads((workplace / "work_dirs/demo/summary.json").read_text())
    assert summary.pop("seconds") >= 0
    assert summary == dict(box_ap=0.61, mask_ap=0.52, miou=0.77)
    assert [command[:2] for command in commands] == [
        ["train", "mmdet"], ["test", "mmdet"], ["train", "mmseg"], ["test", "mmseg"],
    ]  # fmt: skip


@pytest.mark.long
def test_retinanet_trains_on_the_demos_data(demo, root, tmp_path, monkeypatch):
    """On the demo's data and schedule: its config is not part of the demo itself."""
    pytest.importorskip("mmdet")
    (tmp_path / "configs").symlink_to(root / "configs")
    (tmp_path / "tools").symlink_to(root / "tools")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    demo.make_data()
    config, work_dir = "configs/demo/retinanet_softpp-mini_fpn_shapes.py", tmp_path / "work_dirs"
    task = demo.Task("retinanet", "mmdet", config, dict(box_ap="coco/bbox_mAP"), 1, "results.pkl")
    assert demo.measure(task, work_dir, 0)["box_ap"] >= 0.5


def test_too_little_disk_space_is_an_error_at_the_start(demo, workplace, monkeypatch):
    monkeypatch.setattr(demo, "NEEDED_BYTES", 1e18)
    with pytest.raises(demo.DemoError, match=r"the demo needs \d+ MB; free some"):
        demo.demo(demo.VARIANTS[0])


def test_the_line_that_opens_the_explorer_names_what_the_demo_writes(demo, root, readme_word):
    """Config, checkpoint and images of one and the same model, which the README names."""
    page = (root / "docs/explorer.md").read_text()
    command = re.search(r"after `make demo`:\n\n```\n(.*?)```", page, re.S)[1]
    command = command.replace("\\\n", "").replace("$(cat ", "").replace(')"', '"')
    words = shlex.split(command)
    assert words[:3] == [".venv/bin/python", "-m", "mmsoft.explore"]  # make demo activates nothing
    config, checkpoint, option, images = words[3:]
    (task,) = (task for task in demo.tasks(demo.VARIANTS[0]) if task.config == config)
    folder = task.folder(demo.place(demo.VARIANTS[0], 0)).relative_to(demo.ROOT)
    assert checkpoint == (folder / "last_checkpoint").as_posix()
    assert option == "--images"
    data = Config.fromfile(root / config, import_custom_modules=False).val_dataloader.dataset
    assert images.startswith(f"{demo.DATA}/")
    assert images == f"{data.data_root.rstrip('/')}/{data.data_prefix.img_path}"
    assert readme_word == dict(detection="detector", segmentation="segmentor")[task.name]


@pytest.fixture
def readme_word(root):
    text = " ".join((root / "README.md").read_text().split())
    return re.search(r"\[One line\]\(docs/explorer.md\) then opens the (\w+)", text)[1]
