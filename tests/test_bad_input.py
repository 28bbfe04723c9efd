"""Errors for wrong paths, checkpoints and names: raised before training, naming the cause.

The libraries check data sets and files; we check the backbone and what is loaded into it.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from true_layout import make_coco

torch = pytest.importorskip("torch")

DETECTOR = "retinanet/retinanet_softpp-t_fpn_1x_coco.py"
SEGMENTOR = "upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py"
CLASSIFIER = "soft/softpp-tiny_8xb128_in1k.py"


@pytest.fixture
def error_of(root, run_outside):
    """Run a library's train.py, or test.py where a checkpoint is given, and give its error."""

    def run(package, config, *options, checkpoint=None):
        pytest.importorskip(package)
        script = "train.py" if checkpoint is None else "test.py"
        command = [Path(find_spec(package).origin).parent / ".mim/tools" / script]
        command += [root / "configs" / config, *([] if checkpoint is None else [checkpoint])]
        command += ["--work-dir", "work", *(["--cfg-options", *options] if options else [])]
        done = run_outside(*command)
        output = done.stdout + done.stderr
        assert done.returncode != 0
        assert "(train)" not in output
        assert "(test)" not in output
        return output.strip().splitlines()[-1], output

    return run


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "config", "named"),
    [
        ("mmdet", DETECTOR, "data/coco/annotations/instances_train2017.json"),
        ("mmseg", SEGMENTOR, "data/ade/ADEChallengeData2016/images/training"),
        ("mmpretrain", CLASSIFIER, "data/imagenet/train"),
    ],
)
def test_missing_data_set(package, config, named, error_of):
    error, _ = error_of(package, config)
    assert error.startswith("FileNotFoundError")
    assert named in error


@pytest.mark.long
def test_annotations_without_pictures(error_of, tmp_path):
    coco = make_coco(tmp_path)
    for split in ("train2017", "val2017"):
        shutil.rmtree(coco / split)
    error, _ = error_of("mmdet", DETECTOR)
    assert error.startswith("FileNotFoundError")
    assert "data/coco/train2017/0000000000" in error


def test_unknown_arch_in_an_inherited_config(error_of, root, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"_base_ = '{root}/configs/{DETECTOR}'\nmodel = dict(backbone=dict(arch='tinny'))\n"
    )
    error, _ = error_of("mmdet", tmp_path / "mine.py")
    assert "arch 'tinny' is unknown; choose 'tiny' ('t'), 'small' ('s')" in error


def save(backbone, file):
    """A detector's checkpoint with the weights of `backbone`, a dict of its parameters."""
    weights = {f"backbone.{name}": value for name, value in backbone.items()}
    torch.save(dict(state_dict=weights, meta={}), file)


def test_checkpoint_of_another_architecture(error_of, tmp_path):
    from mmsoft.models import SOFTPlusPlus

    make_coco(tmp_path)
    save(SOFTPlusPlus("small").state_dict(), tmp_path / "small.pth")
    error, output = error_of("mmdet", DETECTOR, checkpoint="small.pth")
    assert "depths [1, 3, 7, 4] but the config has [1, 2, 3, 2]; change the arch" in error
    assert "from path: small.pth" in output  # the line before


@pytest.mark.long
def test_checkpoint_of_another_backbone(error_of, tmp_path):
    make_coco(tmp_path)
    save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    error, output = error_of("mmdet", DETECTOR, "load_from=resnet.pth")
    assert "no SOFT++ backbone but keys such as backbone.conv1.weight; name a checkpoint" in error
    assert "from path: resnet.pth" in output


@pytest.mark.long
def test_missing_checkpoint(error_of, tmp_path):
    make_coco(tmp_path)
    error, _ = error_of("mmdet", DETECTOR, checkpoint="epoch_12.pth")
    assert error == "FileNotFoundError: epoch_12.pth can not be found."
