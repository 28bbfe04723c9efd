"""Training and testing on the Long Range Arena: every config, on small data in the true formats."""

import json
from pathlib import Path

import pytest
import torch
from lra_data import WRITERS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from mmsoft.builder import build_model
from mmsoft.datasets.long_range_arena import SequenceDataset
from mmsoft.models.backbones.sequence import ATTENTIONS
from mmsoft.registry import DATASETS

CONFIGS = sorted((Path(__file__).parents[2] / "configs/lra").glob("*.py"))
# Steps, warm-up, batch as published (arXiv 2102.03902).
SCHEDULES = {
    "listops": (5000, 1000, 32),
    "listops-1000": (5000, 1000, 32),
    "text": (20000, 8000, 32),
    "retrieval": (30000, 800, 32),
    "image": (35000, 175, 256),
    "pathfinder32": (62400, 312, 256),
}


def task(path):
    return path.stem.removeprefix("softpp_")


def test_there_is_a_config_for_every_task():
    assert {task(path) for path in CONFIGS} == set(SCHEDULES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_has_the_published_model_and_schedule(path):
    pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))
    config = Config.fromfile(path)
    assert "mmsoft.checkpoint.loader" in config.custom_imports["imports"]
    assert config.default_hooks.checkpoint.type == "mmsoft.CheckpointHook"
    steps, warmup, batch = SCHEDULES[task(path)]
    assert config.train_cfg.max_iters == steps
    assert config.train_dataloader.batch_size == config.test_dataloader.batch_size == batch
    model = build_model(config)
    backbone = model.backbone
    settings = dict(embed_dims=64, depth=2, num_heads=2, hidden_dims=128)
    assert backbone.arch_settings == settings
    attention = backbone.blocks[0].attn
    assert -(-backbone.max_length // attention.landmark_stride) in (63, 64)
    assert attention.value_conv is None
    assert attention.drop.p == backbone.pos_drop.p == 0.1
    hidden, last = (module for module in model.head.modules() if isinstance(module, nn.Linear))
    assert hidden.in_features == (256 if task(path) == "retrieval" else 64)
    assert hidden.out_features == last.in_features == 128
    data_set = DATASETS.get(config.train_dataloader.dataset.type)
    assert issubclass(data_set, SequenceDataset)
    longest = config.train_dataloader.dataset.get("max_length") or data_set.length
    assert longest == backbone.max_length
    assert model.head.num_classes == len(data_set.METAINFO["classes"])
    # no decay; who asks for it gets it for what is not exempt
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0}
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    config.optim_wrapper.optimizer.weight_decay = 0.1
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    spared = {name for name, p in backbone.named_parameters() if decays[id(p)] == 0}
    assert spared == backbone.no_weight_decay()
    # linear to the full rate, and to 0
    up, down = config.param_scheduler
    assert (up.end, down.begin, down.end) == (warmup, warmup, steps)
    if task(path) != "listops":
        return
    rates = learning_rates(config, optimizer)
    assert rates[warmup] == max(rates) == pytest.approx(1e-4)
    assert rates[0] == pytest.approx(4e-6)
    assert rates[-1] == pytest.approx(0, abs=1e-8)
    middle = (warmup + steps) // 2
    assert rates[middle] == pytest.approx(5e-5, rel=0.01)


def learning_rates(config, optimizer):
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
        for scheduler in config.param_scheduler
    ]
    rates = []
    for _ in range(config.train_cfg.max_iters + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.fixture
def train(root, run_outside, tmp_path):
    """Train and test configs on small data; gives a line for each."""

    def train(paths, *changes, folder="work"):
        pairs = []
        for path in paths:
            data = tmp_path / "data" / task(path)
            if not data.exists():
                WRITERS[task(path).removesuffix("-1000")](data)
            pairs.append(f"{path}={data}")
        script = root / "tests/helpers/lra_runs.py"
        done = run_outside("-W", "ignore", script, tmp_path / folder, *pairs, "--", *changes)
        found = [json.loads(s) for s in done.stdout.splitlines() if s.startswith('{"config"')]
        return found, done

    return train


def test_every_task_trains_and_tests(train):
    pytest.importorskip("mmpretrain")
    found, done = train(CONFIGS)
    assert len(found) == len(CONFIGS), done.stderr[-3000:]
    for line in found:
        assert len(line["losses"]) == 3
        assert all(0 < loss < 10 for loss in line["losses"])
        assert 0 <= line["metrics"]["accuracy/top1"] <= 100
        assert line["steps"] == ([] if "text" in line["config"] else [3])  # of the validations
        assert line["kept"] == ["iter_2.pth", "iter_3.pth"]


@pytest.mark.long
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_trains_and_tests(train, attention):
    pytest.importorskip("mmpretrain")
    paths = [path for path in CONFIGS if task(path) in ("listops", "retrieval")]
    found, done = train(paths, f"model.backbone.attention={attention}")
    assert len(found) == 2, done.stderr[-3000:]


@pytest.mark.long
def test_a_resumed_run_goes_on_where_it_stopped(train, tmp_path):
    pytest.importorskip("mmpretrain")
    (path,) = (path for path in CONFIGS if task(path) == "listops")
    changes = ("randomness.seed=0", "model.backbone.drop_rate=0")  # dropout draws anew
    (whole,), _ = train([path], *changes, folder="whole")
    saved = tmp_path / "whole/0/iter_2.pth"
    (resumed,), _ = train([path], *changes, "resume=True", f"load_from={saved}", folder="resumed")
    assert len(whole["losses"]) == 3
    assert resumed["losses"] == whole["losses"][2:]
    last = [tmp_path / name / "0/iter_3.pth" for name in ("whole", "resumed")]
    one, other = (torch.load(path, weights_only=True) for path in last)
    assert one["message_hub"]["runtime_info"]["iter"] == 2
    assert other["message_hub"]["runtime_info"]["iter"] == 2
    torch.testing.assert_close(other["state_dict"], one["state_dict"], rtol=0, atol=0)
    states = [saved["optimizer"].pop("state") for saved in (one, other)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert other["optimizer"] == one["optimizer"]  # groups with their rates
    assert other["param_schedulers"] == one["param_schedulers"]


def test_a_missing_folder_is_named(train, tmp_path):
    pytest.importorskip("mmpretrain")
    (path,) = (path for path in CONFIGS if task(path) == "listops")
    (tmp_path / "data/listops").mkdir(parents=True)
    found, done = train([path])
    assert not found
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError")
    assert "basic_train.tsv is missing: ListOps expects in" in last
    assert "make_listops.py writes them" in last
