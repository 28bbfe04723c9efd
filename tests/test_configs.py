"""Every config under configs/: a training step and a prediction, through its names alone."""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

from mmsoft.models import SOFTPlusPlus

CONFIGS = Path(__file__).parents[1] / "configs"
# By the first word of a config's name.
LIBRARIES = dict(retinanet="mmdet", mask="mmdet", upernet="mmseg", soft="mmpretrain")
LIBRARIES["softpp"] = "mmpretrain"
LONG = re.compile(r"[-_](s|m|l|small|medium|large|huge|amp|layer)[-_]")


def groups():
    """(library, whether long) -> configs."""
    found = defaultdict(list)
    for path in sorted(CONFIGS.glob("**/*.py")):
        library = LIBRARIES[re.split("[-_]", path.stem)[0]]
        found[library, bool(LONG.search(path.stem))].append(str(path))
    return [
        pytest.param(
            library,
            paths,
            id=f"{library}-{'long' if is_long else 'quick'}",
            marks=[pytest.mark.long] if is_long else [],
        )
        for (library, is_long), paths in found.items()
    ]


@pytest.mark.parametrize(("library", "configs"), groups())
def test_every_parameter_learns(library, configs, root, run_outside):
    pytest.importorskip(library)
    done = run_outside("-W", "ignore", root / "tests/train_step.py", library, *configs)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["config"] for line in lines] == configs
    wrong = {line["config"]: line["problems"] for line in lines if line["problems"]}
    assert not wrong, "\n".join(f"{config}: {p}" for config, ps in wrong.items() for p in ps)


@pytest.mark.parametrize(
    "config",
    [
        "retinanet/retinanet_softpp-t_fpn_1x_coco.py",
        "upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py",
    ],
)
def test_imagenet_weights_by_cfg_options(config, tmp_path):
    """As the READMEs say: the configs have no init_cfg, and the command line gives them one."""
    config = Config.fromfile(CONFIGS / config)
    pytest.importorskip(config.default_scope)
    trained = SOFTPlusPlus("tiny")
    weights = {f"backbone.{name}": value for name, value in trained.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / "epoch_300.pth")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    key = "model.backbone.init_cfg"
    options = [f"{key}.type=Pretrained", f"{key}.checkpoint={tmp_path / 'epoch_300.pth'}"]
    config.merge_from_dict(parser.parse_args(["--cfg-options", *options]).cfg_options)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    init_default_scope("mmengine")
    model.init_weights()
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, weights[f"backbone.{name}"], rtol=0, atol=0)
