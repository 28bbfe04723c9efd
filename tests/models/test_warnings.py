"""Warnings in the log: BatchNorm that nothing has trained, Newton-Raphson of many landmarks."""

import logging

import pytest
import torch
from mmengine.logging import MMLogger
from released import ARCH
from torch import nn

from mmsoft.models import SOFTPlusPlus, attention

NORMS = 6  # three in the stem, one before each later stage
BATCH_NORM = dict(type="BN")


@pytest.fixture
def warnings():
    """What is logged as a warning."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("options", "named", "count"),
    [
        (dict(norm_eval=True), "norm_eval=True", NORMS),
        (dict(norm_eval=True, norm_cfg=dict(type="SyncBN")), "norm_eval=True", NORMS),
        (dict(frozen_stages=0), "frozen_stages=0", 3),
        (dict(frozen_stages=2), "frozen_stages=2", 4),
        (dict(frozen_stages=2, norm_eval=True), "norm_eval=True", NORMS),
    ],
)
def test_one_warning_when_training_starts(options, named, count, warnings):
    model = nn.Sequential(SOFTPlusPlus(ARCH, **dict(norm_cfg=BATCH_NORM) | options))
    model.eval()
    assert warnings == []
    for _ in range(3):  # a Runner does this after every validation
        model.train()
        model.eval()
    (message,) = warnings
    assert f"SOFTPlusPlus: {named} keeps BatchNorm" in message
    assert f"{count} of them (stages.0.patch_embed.0.norm, ...)" in message
    for advice in ("checkpoint=...", "norm_eval=False", "without norm_cfg"):
        assert advice in message


@pytest.mark.parametrize("options", [dict(norm_eval=True), dict(frozen_stages=1)])
@pytest.mark.parametrize("how", ["load_state_dict", "init_cfg"])
def test_no_warning_after_weights_were_loaded(options, how, warnings, tmp_path):
    trained = SOFTPlusPlus(ARCH, norm_cfg=BATCH_NORM).train()
    trained(torch.randn(2, 3, 64, 64))
    if how == "init_cfg":
        torch.save(trained.state_dict(), tmp_path / "weights.pth")
        options = options | dict(
            init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
        )
    model = SOFTPlusPlus(ARCH, **options)
    model.init_weights()
    if how == "load_state_dict":
        model.load_state_dict(trained.state_dict())
    warnings.clear()
    model.train()
    assert warnings == []


@pytest.mark.parametrize(
    "options",
    [
        dict(norm_cfg=BATCH_NORM),
        dict(norm_eval=True, frozen_stages=2),
        dict(norm_eval=True, norm_cfg=dict(type="GN", num_groups=4)),
        dict(norm_eval=True, norm_cfg=dict(type="BN", track_running_stats=False)),
    ],
    ids=str,
)
def test_no_warning_where_nothing_is_kept_untouched(options, warnings):
    SOFTPlusPlus(ARCH, **options).train()
    assert warnings == []


@pytest.mark.parametrize("statistic", ["running_mean", "running_var", "num_batches_tracked"])
def test_only_those_kept_in_evaluation_count(statistic, warnings):
    """The stem's statistics were loaded, and it is frozen; the others are trained."""
    model = SOFTPlusPlus(ARCH, frozen_stages=0, norm_cfg=BATCH_NORM)
    for module in model.stages[0].patch_embed.modules():
        if isinstance(module, nn.BatchNorm2d):
            getattr(module, statistic).fill_(2)
    model.train()
    assert warnings == []


def test_without_data():
    with torch.device("meta"):
        SOFTPlusPlus(ARCH, norm_eval=True, norm_cfg=BATCH_NORM).train()


@torch.no_grad()
def test_one_warning_of_newton_with_many_landmarks(warnings):
    attention._warn_of_many_landmarks.cache_clear()
    loud = dict(landmarks="released", max_landmarks=None)
    model, x = SOFTPlusPlus(ARCH, **loud).eval(), torch.randn(1, 3, 32 * 16, 32 * 17)
    for quiet in (dict(solver="direct"), dict(max_landmarks=49), dict(landmarks="content")):
        SOFTPlusPlus(ARCH, **{**loud, **quiet}).eval()(x)
    model(x[..., :-32])  # 256
    assert warnings == []
    for _ in range(2):
        model(x)
    (message,) = warnings
    assert "more than 256 landmarks and solver='newton'" in message
    assert "max_landmarks=49" in message
