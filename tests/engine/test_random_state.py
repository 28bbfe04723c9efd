"""The hook alone; tests/faults/test_kill_and_resume.py runs it in MMEngine's runner."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop

from mmsoft.engine import RandomStateHook
from mmsoft.engine.hooks import random_state as random_state_hook


def draw():
    """A number from each generator that OpenMMLab's transforms and models draw from."""
    return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002


@pytest.fixture
def runner():
    """At the start of an epoch; `initialized` are the workers the loader's own function saw."""
    initialized = []
    loader = SimpleNamespace(
        num_workers=2, worker_init_fn=initialized.append, _iterator="of the last epoch"
    )
    return SimpleNamespace(
        train_dataloader=loader,
        train_loop=EpochBasedTrainLoop.__new__(EpochBasedTrainLoop),
        seed=3,
        epoch=1,
        iter=10,
        initialized=initialized,
        _randomness_cfg=dict(seed=3),
    )


@pytest.fixture
def hook(runner):
    hook = RandomStateHook()
    hook.before_train(runner)
    return hook


def test_every_iteration_has_its_own_numbers(hook, runner, monkeypatch):
    def numbers(rank=0, **changes):
        vars(runner).update(dict(seed=3, iter=10) | changes)
        monkeypatch.setattr(random_state_hook, "get_rank", lambda: rank)
        draw()
        hook.before_train_iter(runner)
        return draw()

    assert numbers() == numbers()
    drawn = [numbers(), numbers(iter=11), numbers(seed=4), numbers(rank=1), numbers(rank=2)]
    for of_one_generator in zip(*drawn):
        assert len(set(of_one_generator)) == len(drawn)


def test_every_worker_and_epoch_has_its_own_numbers(hook, runner, monkeypatch):
    def numbers(worker=0, rank=0, **changes):
        vars(runner).update(dict(seed=3, epoch=1) | changes)
        monkeypatch.setattr(random_state_hook, "get_rank", lambda: rank)
        hook.before_train_epoch(runner)
        draw()
        runner.train_dataloader.worker_init_fn(worker)
        return draw()

    assert numbers() == numbers()
    assert runner.train_dataloader._iterator is None  # persistent workers would not restart
    drawn = [numbers(), numbers(1), numbers(epoch=2), numbers(seed=4), numbers(rank=1)]
    for of_one_generator in zip(*drawn):
        assert len(set(of_one_generator)) == len(drawn)
    # The function that the loader had is still called, once for each start.
    assert runner.initialized == [0, 0, 0, 1, 0, 0, 0]
