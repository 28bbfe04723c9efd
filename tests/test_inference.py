"""The three libraries' inferencers on a JPEG, each in a separate process.

MMPreTrain's cannot share one with the others, because it leaves its default scope set.
"""

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from true_layout import make_shapes

DETECT = """
{imports}
from mmdet.apis import DetInferencer
inferencer = DetInferencer({model}weights="checkpoint.pth", device="cpu")
inferencer("photo.jpg", out_dir="out", pred_score_thr=0.0, no_save_pred=False)
"""

SEGMENT = """
{imports}
from mmseg.apis import MMSegInferencer
inferencer = MMSegInferencer(model={model!r}, weights="checkpoint.pth", device="cpu")
inferencer("photo.jpg", out_dir="out")
"""

CLASSIFY = """
import json
from mmpretrain import ImageClassificationInferencer
inferencer = ImageClassificationInferencer({model!r}, pretrained="checkpoint.pth", device="cpu")
(result,) = inferencer("photo.jpg", show_dir="out")
print("RESULT", result["pred_label"], result["pred_class"])
"""


long = partial(pytest.param, marks=pytest.mark.long)


@pytest.fixture
def photo(tmp_path):
    """An ordinary picture, as an array; the file is photo.jpg."""
    (scene,) = (make_shapes(tmp_path, 1, 1, 160) / "coco/val2017").iterdir()
    scene.rename(tmp_path / "photo.jpg")
    return cv2.imread(str(tmp_path / "photo.jpg"))


def save(config, path, change, meta):
    """Save the config's model like MMEngine, with classes that torch does not load by default.

    `change` changes its weights, so that the answer is known.
    """
    torch.manual_seed(0)
    config = Config.fromfile(config)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    weights = model.state_dict()
    change(weights)
    meta = dict(dataset_meta=meta(config), cfg=config.pretty_text)
    hub = MessageHub("run")
    hub.update_scalar("train/loss", 1.0)
    torch.save(dict(state_dict=weights, meta=meta, message_hub=hub.state_dict()), path)


@pytest.fixture
def run(run_outside):
    def run(program):
        done = run_outside("-W", "ignore", "-c", program)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


# Without a config the inferencer takes the one that the checkpoint holds.
@pytest.mark.parametrize("given", ["config", long("name"), long("checkpoint alone")])
def test_detector(given, photo, run, root, tmp_path):
    pytest.importorskip("mmdet")
    config = str(root / "configs/demo/retinanet_softpp-mini_fpn_shapes.py")

    def change(weights):
        """Every anchor scores one half instead of one hundredth."""
        for name in ("weight", "bias"):
            weights[f"bbox_head.retina_cls.{name}"].zero_()

    save(config, tmp_path / "checkpoint.pth", change, lambda config: dict(config.metainfo))
    model = {"config": config, "name": Path(config).stem}.get(given)
    model = f"model={model!r}, " if model else ""
    run(DETECT.format(imports="" if given == "config" else "import mmsoft", model=model))
    prediction = json.loads((tmp_path / "out/preds/photo.json").read_text())
    assert 0 < len(prediction["bboxes"]) <= 100
    assert np.allclose(prediction["scores"], 0.5, atol=0.4)
    painted = cv2.imread(str(tmp_path / "out/vis/photo.jpg"))
    assert painted.shape == photo.shape
    x0, y0, x1, y1 = np.clip(np.round(prediction["bboxes"][0]).astype(int), 0, 159)
    change = np.abs(painted.astype(int) - photo).max(2)
    assert change[y0 : y1 + 1, x0 : x1 + 1].max() > 50


@pytest.mark.parametrize("given", [long("config"), "name"])
def test_segmentor(given, photo, run, root, tmp_path):
    pytest.importorskip("mmseg")
    config = str(root / "configs/demo/upernet_softpp-mini_shapes.py")

    def change(weights):
        weights["decode_head.conv_seg.bias"][3] = 100

    save(config, tmp_path / "checkpoint.pth", change, lambda config: dict(config.dataset.metainfo))
    if given == "config":
        run(SEGMENT.format(imports="", model=config))
    else:
        run(SEGMENT.format(imports="import mmsoft", model=Path(config).stem))
    labels = cv2.imread(str(tmp_path / "out/pred/00000000_pred.png"), cv2.IMREAD_GRAYSCALE)
    assert labels.shape == photo.shape[:2]
    assert (labels == 3).all()
    # Painted in that class's colour, of which the inferencer lays 80 percent over the picture.
    painted = cv2.imread(str(tmp_path / "out/vis/photo.jpg"))
    colour = np.array([245, 180, 40])[::-1]
    expected = 0.8 * colour + 0.2 * photo
    assert np.median(np.abs(painted - expected)) < 8


def test_classifier(photo, run, root, tmp_path):
    """By its config; tests/models/test_model_index.py does it by name."""
    categories = pytest.importorskip("mmpretrain.datasets.categories")
    config = str(root / "configs/soft/softpp-tiny_8xb128_in1k.py")

    def change(weights):
        weights["head.fc.bias"][7] = 100

    meta = dict(classes=categories.IMAGENET_CATEGORIES)
    save(config, tmp_path / "checkpoint.pth", change, lambda config: meta)
    output = run(CLASSIFY.format(model=config))
    assert "RESULT 7 cock" in output
    painted = cv2.imread(str(tmp_path / "out/photo.png"))
    # The class is written over the picture in its upper left corner.
    corner = (slice(0, photo.shape[0] // 4), slice(0, photo.shape[1] // 2))
    assert np.abs(painted[corner].astype(int) - photo[corner]).max() > 50


BY_NAME = """
import mmsoft
from mmengine.infer import BaseInferencer

for scope, name in {names!r}:
    Inferencer = type("Inferencer", (), dict(scope=scope))
    try:
        config, weights = BaseInferencer._load_model_from_metafile(Inferencer, name)
        print(config.model.backbone.type, weights)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("first", ["import mmsoft", "import mmengine.infer"])
def test_inferencers_find_our_configs_by_name_and_theirs_as_before(run, first):
    """The library's own names win; what neither has, or another library, is an error."""
    ours, theirs = "retinanet_softpp-t_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"
    names = [("mmdet", ours)]
    if first == "import mmsoft":
        names += [("mmseg", "upernet_softpp-mini_shapes"), ("mmdet", theirs)]
        names += [("mmdet", f"mmsoft::retinanet/{ours}.py")]
        names += [("mmdet", "retinanet_softpp_t_fpn_1x_coco"), ("mmdet", "none"), ("mmseg", ours)]
    found = run(first + BY_NAME.format(names=names)).splitlines()[-len(names) :]
    assert found[0] == "mmsoft.SOFTPlusPlus None"
    if first == "import mmsoft":
        assert found[1] == "mmsoft.SOFTPlusPlus None"
        assert found[2].startswith("ResNet https://")
        assert found[3] == "mmsoft.SOFTPlusPlus None"
        assert found[4:] == [
            "Cannot find model: retinanet_softpp_t_fpn_1x_coco in mmdet, nor among mmsoft's "
            f"configs, which have {ours}",
            "Cannot find model: none in mmdet, nor among mmsoft's configs",
            f"{ours} is a config of mmdet, not of mmseg: use the inferencer of mmdet",
        ]


AGAIN = """
import sys

import mmsoft
sys.modules["rich.progress"] = None
try:
    import mmengine.infer
except ImportError:
    del sys.modules["rich.progress"]
finders = len(sys.meta_path)
from mmengine.infer import BaseInferencer
assert BaseInferencer._load_model_from_metafile.__wrapped__
assert len(sys.meta_path) == finders - 1
"""


def test_names_are_known_when_inferencers_are_imported_at_the_second_attempt(run):
    run(AGAIN)


def test_every_config_has_a_name_of_its_own(root):
    names = [path.name for path in (root / "configs").glob("*/*.py")]
    assert len(names) == len(set(names)) > 30
    assert all(name == name.lower() for name in names)  # as MMEngine asks for them
