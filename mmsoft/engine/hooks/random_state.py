"""Random numbers that do not depend on when a run was interrupted."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmsoft.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Make a resumed run draw the random numbers of an uninterrupted one.

    MMEngine keeps the seed in its checkpoints but not the state of the generators, so that dropout,
    stochastic depth, random sampling and augmentations differ after ``--resume``
    (open-mmlab/mmdetection issue 7508). This hook seeds every iteration by seed, rank and
    iteration, and the data loader's workers at the start of every epoch. A resumed run then repeats
    the uninterrupted one bit for bit, if its kernels are deterministic::

        randomness = dict(seed=0)
        custom_hooks = [dict(type='mmsoft.RandomStateHook')]

    Epoch-based runs start new workers in every epoch, also with ``persistent_workers=True``;
    MMEngine's iteration-based loop replays the data instead. ``num_workers=0`` is not covered: the
    data then draw from the generators of the training itself.
    """

    priority = "VERY_HIGH"  # before hooks that draw

    def before_train(self, runner: Any) -> None:
        """Check the configuration.

        Raises:
            ValueError: the run has no seed in its config, or loads data without workers.
        """
        if runner._randomness_cfg.get("seed") is None:
            raise ValueError("mmsoft.RandomStateHook needs a seed: set randomness=dict(seed=...)")
        if runner.train_dataloader.num_workers == 0:
            raise ValueError("mmsoft.RandomStateHook needs train_dataloader.num_workers >= 1")
        self._init_worker = runner.train_dataloader.worker_init_fn

    def before_train_epoch(self, runner: Any) -> None:
        """Seed the workers of this epoch."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader, keys = runner.train_dataloader, (runner.seed, get_rank(), runner.epoch)
            loader._iterator = None  # ends persistent workers, which are seeded only once
            loader.worker_init_fn = partial(_start_worker, self._init_worker, keys)

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Seed this iteration."""
        _set_random_state(runner.seed, get_rank(), runner.iter)


def _start_worker(
    init_worker: Callable[[int], None], keys: tuple[int, ...], worker_id: int
) -> None:
    init_worker(worker_id)
    _set_random_state(*keys, worker_id)


def _set_random_state(*keys: int) -> None:
    """Seed the generators of Python, NumPy and torch, each from a well-mixed hash of ``keys``."""
    # Their number too: NumPy takes (0, 0) and (0, 0, 0) for the same.
    a, b, c = map(int, np.random.SeedSequence((len(keys), *keys)).generate_state(3))
    random.seed(a)
    np.random.seed(b)  # noqa: NPY002  (OpenMMLab's transforms draw from it)
    torch.manual_seed(c)
