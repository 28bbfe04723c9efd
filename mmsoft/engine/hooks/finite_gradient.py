"""Stop before NaN or infinity reaches the weights."""

import math
from collections import deque
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn

from mmsoft.registry import HOOKS


@HOOKS.register_module()
class FiniteGradientHook(Hook):
    """Stop the run, naming the samples, when a gradient or the loss is NaN or infinite.

    The gradients are checked just before every step of the optimizer, so that the weights and the
    checkpoints stay valid: fix or leave out the named files and go on with ``--resume``. Under
    float16, whose gradient scaler skips steps with infinite gradients regularly, only the loss is
    checked. On a GPU this synchronizes once per iteration.

    MMDetection's ``CheckInvalidLossHook`` checks the loss alone, after the step, and names no
    samples::

        custom_hooks = [dict(type='mmsoft.FiniteGradientHook')]
    """

    priority = "VERY_HIGH"  # before hooks that use the weights, like the moving average

    def before_train(self, runner: Any) -> None:
        """Watch the steps of every optimizer."""
        self.runner = runner
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        accumulated = max(wrapper._accumulative_counts for wrapper in wrappers)
        self.batches: deque[dict] = deque(maxlen=accumulated)  # what the gradients come from
        for wrapper in wrappers:
            wrapper.optimizer.register_step_pre_hook(self._check_gradients)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Record the samples, and check their pixels where these are floating point.

        Raises:
            FloatingPointError: one is NaN or infinite; running statistics would include it at once.
        """
        self.batches.append(data_batch)
        if any(_is_not_finite(image) for image in data_batch["inputs"]):
            self._stop("the images are not finite")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Check the losses.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        losses = {k: float(v) for k, v in (outputs or {}).items() if "loss" in k}
        if bad := [f"{name} is {v}" for name, v in losses.items() if not math.isfinite(v)]:
            self._stop(", ".join(bad))

    def _check_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and not nn.utils.get_total_norm(gradients, math.inf).isfinite():
            names = {p: name for name, p in self.runner.model.named_parameters()}
            bad = [names[p] for p in parameters if p.grad is not None and not _is_finite(p.grad)]
            self._stop(f"the gradient is not finite in {len(bad)} parameters, among them {bad[0]}")

    def _stop(self, what: str) -> None:
        names, offending = [], []
        for batch in self.batches:
            for i, sample in enumerate(batch["data_samples"]):
                name = str(sample.metainfo.get("img_path", sample.metainfo.get("img_id")))
                names.append(name)
                if _is_not_finite(batch["inputs"][i]):
                    offending.append(name)
        where = f"the samples are {', '.join(names)}"
        if offending:
            where = f"there are NaN or infinite pixels in {', '.join(offending)}"
        raise FloatingPointError(
            f"in iteration {self.runner.iter + 1} {what}; {where}. The weights were not changed by "
            "it: fix or leave out these files and go on with --resume"
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _is_not_finite(image: Tensor) -> bool:
    return image.is_floating_point() and not _is_finite(image)
