"""The three libraries' inferencers on a JPEG, each in a separate process.

MMPreTrain's cannot share one with the others, because it leaves its default scope set.
"""

import json

import cv2
import numpy as np
import pytest
from true_layout import make_shapes

# Builds the config's model, changes its weights so that the answer is known, and saves it like
# MMEngine, with classes that torch does not load by default.
SAVE = """
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
torch.manual_seed(0)
config = Config.fromfile({config!r})
init_default_scope(config.default_scope)
model = MODELS.build(config.model)
model.init_weights()
weights = model.state_dict()
{change}
meta = dict(dataset_meta={meta}, cfg=config.pretty_text)
hub = MessageHub.get_instance("run")
hub.update_scalar("train/loss", 1.0)
hub = hub.state_dict()
torch.save(dict(state_dict=weights, meta=meta, message_hub=hub), "checkpoint.pth")
"""

DETECT = """
{imports}
from mmdet.apis import DetInferencer
inferencer = DetInferencer({model}weights="checkpoint.pth", device="cpu")
inferencer("photo.jpg", out_dir="out", pred_score_thr=0.0, no_save_pred=False)
"""

SEGMENT = """
from mmseg.apis import MMSegInferencer
inferencer = MMSegInferencer(model={config!r}, weights="checkpoint.pth", device="cpu")
inferencer("photo.jpg", out_dir="out")
"""

CLASSIFY = """
import json
from mmpretrain import ImageClassificationInferencer
inferencer = ImageClassificationInferencer({model!r}, pretrained="checkpoint.pth", device="cpu")
(result,) = inferencer("photo.jpg", show_dir="out")
print("RESULT", result["pred_label"], result["pred_class"])
"""


@pytest.fixture
def photo(tmp_path):
    """An ordinary picture, as an array; the file is photo.jpg."""
    (scene,) = (make_shapes(tmp_path, 1, 1, 160) / "coco/val2017").iterdir()
    scene.rename(tmp_path / "photo.jpg")
    return cv2.imread(str(tmp_path / "photo.jpg"))


@pytest.fixture
def run(run_outside):
    def run(program):
        done = run_outside("-W", "ignore", "-c", program)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


# Without a config the inferencer takes the one that the checkpoint holds.
@pytest.mark.parametrize(
    "given", ["config", pytest.param("checkpoint alone", marks=pytest.mark.long)]
)
def test_detector(given, photo, run, root, tmp_path):
    pytest.importorskip("mmdet")
    config = str(root / "configs/demo/retinanet_softpp-mini_fpn_shapes.py")
    # Every anchor scores one half instead of one hundredth.
    change = "; ".join(
        f'weights["bbox_head.retina_cls.{name}"].zero_()' for name in ("weight", "bias")
    )
    run(SAVE.format(config=config, change=change, meta="dict(config.metainfo)"))
    if given == "config":
        run(DETECT.format(imports="", model=f"model={config!r}, "))
    else:
        run(DETECT.format(imports="import mmsoft", model=""))
    prediction = json.loads((tmp_path / "out/preds/photo.json").read_text())
    assert 0 < len(prediction["bboxes"]) <= 100
    assert np.allclose(prediction["scores"], 0.5, atol=0.4)
    painted = cv2.imread(str(tmp_path / "out/vis/photo.jpg"))
    assert painted.shape == photo.shape
    x0, y0, x1, y1 = np.clip(np.round(prediction["bboxes"][0]).astype(int), 0, 159)
    change = np.abs(painted.astype(int) - photo).max(2)
    assert change[y0 : y1 + 1, x0 : x1 + 1].max() > 50


def test_segmentor(photo, run, root, tmp_path):
    pytest.importorskip("mmseg")
    config = str(root / "configs/demo/upernet_softpp-mini_shapes.py")
    change = 'weights["decode_head.conv_seg.bias"][3] = 100'
    run(SAVE.format(config=config, change=change, meta="dict(config.dataset.metainfo)"))
    run(SEGMENT.format(config=config))
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
    pytest.importorskip("mmpretrain")
    config = str(root / "configs/soft/softpp-tiny_8xb128_in1k.py")
    change = 'weights["head.fc.bias"][7] = 100'
    run(
        "from mmpretrain.datasets.categories import IMAGENET_CATEGORIES\n"
        + SAVE.format(config=config, change=change, meta="dict(classes=IMAGENET_CATEGORIES)")
    )
    output = run(CLASSIFY.format(model=config))
    assert "RESULT 7 cock" in output
    painted = cv2.imread(str(tmp_path / "out/photo.png"))
    # The class is written over the picture in its upper left corner.
    corner = (slice(0, photo.shape[0] // 4), slice(0, photo.shape[1] // 2))
    assert np.abs(painted[corner].astype(int) - photo[corner]).max() > 50


BY_NAME = """
import mmsoft
from mmengine.infer import BaseInferencer
class Inferencer:
    scope = {scope!r}
lookup = BaseInferencer._load_model_from_metafile
config, weights = lookup(Inferencer, {name!r})
print(config.model.backbone.type, weights)
"""


@pytest.mark.parametrize("first", ["import mmsoft", "import mmengine.infer"])
def test_inferencers_find_our_configs_by_name_and_theirs_as_before(run_outside, first):
    """The library's own names win; what neither has, or another library, is an error."""

    def look(scope, name):
        done = run_outside("-c", first + BY_NAME.format(scope=scope, name=name))
        return done.stdout.splitlines()[-1:] or done.stderr.splitlines()[-1:]

    ours, theirs = "retinanet_softpp-t_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"
    assert look("mmdet", ours) == ["mmsoft.SOFTPlusPlus None"]
    if first == "import mmsoft":
        assert look("mmseg", "upernet_softpp-mini_shapes") == ["mmsoft.SOFTPlusPlus None"]
        (line,) = look("mmdet", theirs)
        assert line.startswith("ResNet https://")
        assert look("mmdet", "retinanet_x") == [
            "ValueError: Cannot find model: retinanet_x in mmdet"
        ]
        assert look("mmseg", ours) == [
            f"ValueError: {ours} is a config of mmdet, not of mmseg: use the inferencer of mmdet"
        ]


def test_every_config_has_a_name_of_its_own(root):
    names = [path.name for path in (root / "configs").glob("*/*.py")]
    assert len(names) == len(set(names)) > 30
    assert all(name == name.lower() for name in names)  # as MMEngine asks for them
