"""Every config under configs/: it builds, trains and follows its recipe."""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import load_checkpoint

from mmsoft.builder import build_model
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.layers import ConvNormAct
from mmsoft.models.norms import ImageNorm, PixelNorm

CONFIGS = Path(__file__).parents[1] / "configs"
# By the first word of a config's name.
LIBRARIES = dict(retinanet="mmdet", mask="mmdet", upernet="mmseg", soft="mmpretrain")
LIBRARIES["softpp"] = "mmpretrain"
# A training step of these takes long.
LONG = re.compile(
    r"[-_](s|m|l|small|medium|large|huge|amp|layer)[-_]|^(?!.*mini_).*_(nuclei|bccd)$"
)
# Folder -> learning rate (of the arch, if it has its own), weight decay, whether biases decay.
RECIPES = dict(
    soft=(dict(medium=4e-4, large=3.3e-4, huge=2.7e-4), 1e-3, 0.05, False),
    retinanet=({}, 1e-4, 1e-4, True),
    mask_rcnn=({}, 1e-4, 1e-4, True),
    upernet=({}, 6e-5, 0.01, True),
    demo=({}, 2e-3, 0.05, True),
    nuclei=({}, 1e-3, 0.05, True),
    bccd=({}, 1e-3, 0.05, True),
)


def libraries():
    """Library -> configs, but for those of sequences, which tests/datasets/ trains."""
    found = defaultdict(list)
    for path in sorted(CONFIGS.glob("[!_]*/*.py")):
        if path.parent.name == "lra":
            continue
        found[LIBRARIES[re.split("[-_]", path.stem)[0]]].append(str(path))
    return found


def groups():
    """(library, configs), those that take long apart."""
    return [
        pytest.param(
            library,
            paths,
            id=f"{library}-{'long' if is_long else 'quick'}",
            marks=[pytest.mark.long] if is_long else [],
        )
        for library, all_paths in libraries().items()
        for is_long in (False, True)
        if (paths := [p for p in all_paths if bool(LONG.search(Path(p).stem)) == is_long])
    ]


@pytest.fixture
def results(root, run_outside):
    """Run tests/helpers/train_step.py on a library's configs and give its line for each of them."""

    def results(library, configs, *flags):
        pytest.importorskip(library)
        script = root / "tests/helpers/train_step.py"
        done = run_outside("-W", "ignore", script, *flags, library, *configs)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert [line["config"] for line in lines] == configs
        wrong = {line["config"]: line["problems"] for line in lines if line["problems"]}
        assert not wrong, "\n".join(f"{config}: {p}" for config, ps in wrong.items() for p in ps)
        return lines

    return results


@pytest.mark.parametrize(("library", "configs"), groups())
def test_every_parameter_learns(library, configs, results):
    results(library, configs)


@pytest.mark.parametrize(("library", "configs"), libraries().items())
def test_every_config_asks_for_the_safe_loader_and_hook(library, configs):
    pytest.importorskip(library)
    for path in configs:
        config = Config.fromfile(path, import_custom_modules=False)
        assert "mmsoft.checkpoint.loader" in config.custom_imports["imports"], path
        assert config.default_hooks.checkpoint.type == "mmsoft.CheckpointHook", path


@pytest.mark.parametrize(("library", "configs"), libraries().items())
def test_every_config_builds_with_its_recipes_weight_decay(library, configs, results):
    """Every parameter of every model."""
    for line in results(library, configs, "--build"):
        config, settings = Path(line["config"]), line["settings"]
        rates, decays = ({values[i] for values in settings.values()} for i in (0, 1))
        if config.parent.name == "demo" and len(decays) == 1:
            continue  # one decay for all
        own, rate, decay, bias_decays = RECIPES[config.parent.name]
        rate = next((own[arch] for arch in own if arch in config.stem), rate)
        assert max(rates) == pytest.approx(rate), config
        assert len(rates) == (10 if "layer-decay" in config.stem else 1), config  # Tiny's depths
        seen = set()
        for name, (_, found) in settings.items():
            parameter = name.rpartition(".")[2]
            if exempt := (
                parameter in ("pos_embed", "cls_token", "relative_position_bias_table")
                or name in line["norms"]
                or (parameter == "bias" and not bias_decays)
            ):
                seen.add(parameter)
            assert found == (0 if exempt else pytest.approx(decay)), f"{config}: {name}"
        own = {"pos_embed", "cls_token"} if "soft" in config.stem else set()
        own |= {"relative_position_bias_table"} if "swin" in config.stem else set()
        assert seen == {"weight", "bias"} | own, config


def test_backbones_on_real_images_share_the_rest():
    """Data, heads and schedule: a config of these folders changes its backbone and its widths."""
    groups = defaultdict(list)
    for folder in ("nuclei", "bccd"):
        for path in sorted((CONFIGS / folder).glob("*.py")):
            if "no-attention" not in path.stem:  # which imports its class
                groups[folder, path.stem.partition("_")[0]].append(path)
    assert [len(paths) for paths in groups.values()] == [10, 11, 10]
    for paths in groups.values():
        backbones, rests = [], []
        for path in paths:
            config = Config.fromfile(path, import_custom_modules=False).to_dict()
            backbone = config["model"].pop("backbone")
            backbones.append(backbone)
            for part in ("neck", "decode_head", "auxiliary_head"):
                config["model"].get(part, {}).pop("in_channels", None)
            rests.append(config)
            assert not backbone.get("init_cfg"), path
            assert backbone["type"] != "ResNet" or backbone["norm_eval"] is False, path
            assert backbone.get("drop_path_rate", 0) == 0, path
        assert all(rest == rests[0] for rest in rests)
        assert len({json.dumps(backbone) for backbone in backbones}) == len(paths)


@pytest.mark.parametrize(
    ("config", "epoch_length", "expected"),
    [
        # The authors' release: from 1e-6 within 10 epochs, then by a cosine, which ends with 300.
        (
            "soft/softpp-tiny_8xb128_in1k.py",
            100,
            {0: 1e-6, 5: 5e-4, 10: 1e-3, 155: (1e-3 + 5e-5) / 2, 300: 5e-5},
        ),
        ("soft/soft-huge_8xb32_in1k.py", 100, {0: 2.7e-7, 10: 2.7e-4, 300: 5e-5}),
        # Swin's in MMDetection.
        (
            "mask_rcnn/mask-rcnn_softpp-s_fpn_ms-3x_coco.py",
            1000,
            {0: 1e-7, 0.5: 5e-5, 1: 1e-4, 26.9: 1e-4, 27: 1e-5, 32.9: 1e-5, 33: 1e-6, 36: 1e-6},
        ),
    ],
)
def test_learning_rate_over_the_epochs(config, epoch_length, expected):
    config = Config.fromfile(CONFIGS / config)
    assert max(expected) == config.train_cfg.max_epochs
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], config.optim_wrapper.optimizer.lr)
    defaults = dict(optimizer=optimizer, epoch_length=epoch_length)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(end=config.train_cfg.max_epochs) | cfg, default_args=defaults)
        for cfg in config.param_scheduler
    ]
    for iteration in range(max(expected) * epoch_length + 1):
        if (epoch := iteration / epoch_length) in expected:
            rate = optimizer.param_groups[0]["lr"]
            assert rate == pytest.approx(expected[epoch], rel=0.02), epoch
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % epoch_length == 0:
                scheduler.step()


def test_momentum_of_the_averaged_weights():
    """In short runs the initial weights are forgotten; late in the schedule it is the released one.

    The model is one number: 1 at first, 0 after every update, so that the average is the share of
    the initial weights.
    """
    config = Config.fromfile(CONFIGS / "soft/softpp-tiny_8xb128_in1k.py")
    init_default_scope(config.default_scope)
    pytest.importorskip("mmpretrain.engine", exc_type=(ImportError, RuntimeError))
    (hook,) = config.custom_hooks
    hook.pop("priority")  # which the Runner takes
    hook = HOOKS.build(hook)
    model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    model.weight.fill_(1)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_run(runner)
    average = hook.ema_model.module.weight
    shares = []
    for runner.iter in range(200):
        hook.after_train_iter(runner, runner.iter)
        model.weight.zero_()
        shares.append(float(average))
    assert shares[0] == 1
    assert shares[20] < 1e-3
    assert shares[-1] < 1e-7

    iterations = 300 * 1281167 // 1024
    for step, momentum in ((90, 0.1), (9990, 1e-3), (249_990, 4e-5), (iterations - 1, 4e-5)):
        average.fill_(1)
        hook.ema_model.steps.fill_(step)
        hook.after_train_iter(runner, step)
        assert 1 - average.double().item() == pytest.approx(momentum, rel=0.01)


def commands(path):
    """The commands of mim in a README: (config as its options change it, words of the command)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    for command in re.findall(r"^mim (?:train|test) (?:.*\\\n)*.*", path.read_text(), re.M):
        words = command.replace("\\\n", " ").split()
        file = CONFIGS.parent / re.sub(
            r"^work_dirs/(.*)/", f"configs/{path.parent.name}/", words[3]
        )
        config = Config.fromfile(file)
        assert config.default_scope == words[2], command
        config.merge_from_dict(vars(parser.parse_known_args(words)[0])["cfg_options"])
        yield config, words


@pytest.mark.parametrize("folder", ["retinanet", "mask_rcnn", "upernet", "nuclei", "bccd", "soft"])
def test_fine_tuning_command_of_the_readme(folder, tmp_path):
    """Every weight arrives, with the solver, landmarks and BatchNorm that it was trained with."""
    (config,) = (
        c
        for c, _ in commands(CONFIGS / folder / "README.md")
        if "init_cfg" in c.model.backbone or c.load_from
    )
    pytest.importorskip(config.default_scope)
    classifier = Config.fromfile(CONFIGS / "soft/softpp-tiny_8xb128_in1k.py")
    trained = MODELS.build(classifier.model.backbone)
    weights = {f"backbone.{name}": value for name, value in trained.state_dict().items()}
    file = str(tmp_path / "epoch_300.pth")
    head = {"head.fc.weight": torch.zeros(1000, 512), "head.fc.bias": torch.zeros(1000)}
    torch.save(dict(state_dict={**weights, **head}), file)
    if config.load_from:  # a whole classifier, whose head has other classes
        assert config.load_from == "WEIGHTS"
        model = build_model(config)
        load_checkpoint(model, file)
        assert model.head.fc.weight.shape == (10, 512)
    else:
        assert config.model.backbone.init_cfg.checkpoint == "WEIGHTS"
        config.model.backbone.init_cfg.checkpoint = file
        init_default_scope(config.default_scope)
        model = MODELS.build(config.model)
        model.init_weights()
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, weights[f"backbone.{name}"], rtol=0, atol=0)
    assert solvers(model) == solvers(trained) == {"newton"}
    assert not any(m.by_content for m in model.modules() if isinstance(m, SoftmaxFreeAttention))
    norms = [m for m in model.train().backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 6
    # A classifier's images are many.
    assert {norm.training for norm in norms} == {folder == "soft"}


def test_fine_tuning_command_of_the_classifiers_takes_other_classes(tmp_path):
    """In the data sets, Mixup's labels and the head."""
    pytest.importorskip("mmpretrain.datasets", exc_type=(ImportError, RuntimeError))
    (config,) = (c for c, _ in commands(CONFIGS / "soft/README.md") if c.load_from)
    names = [f"class {i}" for i in range(10)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    for split in ("train", "val"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / split / name / "a.jpg"), np.zeros((64, 64, 3), np.uint8))
    init_default_scope(config.default_scope)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        dataset = dict(loader.dataset, data_root=str(tmp_path))
        dataset["classes"] = str(tmp_path / dataset["classes"])
        data = DATASETS.build(dataset)
        assert list(data.metainfo["classes"]) == names
        assert len(data) == 10
    model = build_model(config)
    with torch.no_grad():  # of validation: of one size
        batch = model.data_preprocessor(pseudo_collate([data[0], data[9]]), training=True)
        assert model(**batch, mode="loss")["loss"].isfinite()


def solvers(model):
    return {m.solver for m in model.modules() if isinstance(m, SoftmaxFreeAttention)}


@pytest.mark.parametrize("folder", ["retinanet", "mask_rcnn", "upernet"])
def test_from_scratch_command_of_the_readme(folder):
    """Norms learn without statistics, because two images are too few for them."""
    readme = CONFIGS / folder / "README.md"
    (config,) = (
        c
        for c, words in commands(readme)
        if words[1] == "train" and "init_cfg" not in c.model.backbone
    )
    backbone = MODELS.build(config.model.backbone).train()
    convs = [m for m in backbone.modules() if isinstance(m, ConvNormAct)]
    assert [type(m.norm) for m in convs] == [ImageNorm] + [PixelNorm] * 5
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in backbone.modules())


def test_classifier_commands_use_the_released_solver():
    for config, _ in commands(CONFIGS / "soft/README.md"):
        assert config.model.backbone.get("solver", "newton") == "newton"


def test_pages_about_released_weights_name_no_other_solver():
    root = CONFIGS.parent
    released = r"released\s+(ImageNet )?(file|weights|checkpoint)|authors\s+released(?!\s+no)"
    pages = [root / "README.md", *root.glob("docs/*.md"), *CONFIGS.glob("*/README.md")]
    texts = {page: page.read_text() for page in pages}
    spoken = {page for page, text in texts.items() if re.search(released, text, re.I)}
    assert len(spoken) >= 6
    assert [page for page in spoken if "backbone.solver=" in texts[page]] == []
