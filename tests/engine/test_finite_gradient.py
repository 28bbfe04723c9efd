"""The hook alone; tests/faults/test_bad_batches.py runs it in MMEngine's runner."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import get_priority
from mmengine.structures import BaseDataElement
from torch import nn

from mmsoft.engine import CheckpointHook, FiniteGradientHook


def sample(**metainfo):
    return BaseDataElement(metainfo=metainfo)


@pytest.fixture
def runner():
    """Two parts of a model with an optimizer each, as for a GAN."""
    model = nn.ModuleDict(dict(first=nn.Linear(2, 1), second=nn.Linear(2, 1)))
    wrappers = {
        name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=0.1))
        for name, part in model.items()
    }
    return SimpleNamespace(model=model, optim_wrapper=OptimWrapperDict(**wrappers), iter=4)


@pytest.fixture
def hook(runner):
    hook = FiniteGradientHook()
    hook.before_train(runner)
    return hook


BATCH = dict(inputs=[torch.ones(3, 2, 2)], data_samples=[sample(img_id=7)])


@pytest.mark.parametrize("part", ["first", "second"])
def test_every_optimizer_is_watched(part, hook, runner):
    hook.before_train_iter(runner, 0, BATCH)
    weight = runner.model[part].weight
    before = weight.detach().clone()
    loss = (weight * torch.tensor([1.0, float("inf")])).sum()
    message = rf"iteration 5 .* in 1 parameters, among them {part}.weight; the samples are 7\."
    with pytest.raises(FloatingPointError, match=message):
        runner.optim_wrapper[part].update_params(loss)
    assert torch.equal(weight, before)
    finite = runner.model[part].bias.sum()
    runner.optim_wrapper[part].zero_grad()
    runner.optim_wrapper[part].update_params(finite)


def test_only_floating_point_images_are_checked(hook, runner):
    images = [torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.zeros(3, 2, 2)]
    samples = [sample(img_path="a.png"), sample(img_path="b.png")]
    hook.before_train_iter(runner, 0, dict(inputs=images, data_samples=samples))
    images[1][0, 1, 1] = float("-inf")
    message = r"iteration 5 the images are not finite; there are NaN or infinite pixels in b.png\."
    with pytest.raises(FloatingPointError, match=message):
        hook.before_train_iter(runner, 0, dict(inputs=images, data_samples=samples))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_losses_must_be_finite(value, hook, runner):
    hook.before_train_iter(runner, 0, BATCH)
    hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(1.0), grad_norm=value))
    hook.after_train_iter(runner, 0, outputs=None)
    with pytest.raises(FloatingPointError, match=rf"iteration 5 loss_mask is {value}; the samples"):
        hook.after_train_iter(runner, 0, outputs=dict(loss=1.0, loss_mask=torch.tensor(value)))


def test_the_hook_runs_before_averaging_and_saving():
    hooks = [CheckpointHook(), EMAHook(), FiniteGradientHook()]
    hooks.sort(key=lambda hook: get_priority(hook.priority))
    assert isinstance(hooks[0], FiniteGradientHook)
