"""A hook that monitors the Newton-Raphson inverse during training."""

from contextlib import ExitStack
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmsoft.analysis import BlockState, attention_blocks, capture
from mmsoft.registry import HOOKS


@HOOKS.register_module()
class NewtonConvergenceHook(Hook):
    """Log ``||A A_T A - A||_2 / ||A||_2`` of the layers' inverse, and warn once if it is large.

    The residual of the last Newton-Raphson step (SOFT, figure 5) goes to the visualizer, so to
    every backend it has (TensorBoard, WandB, the JSON file), as ``newton_residual/stage0`` (mean
    over blocks, heads and images) and ``newton_residual/stage0_max`` and so on. Only the main
    process computes and logs. Every ``interval`` iterations this costs about as much as one
    inversion, and one eigendecomposition, of each layer's landmark matrices. It has no effect on a
    model compiled by ``torch.compile``; the log then says so. In a config::

        custom_hooks = [dict(type='mmsoft.NewtonConvergenceHook', interval=100)]

    Args:
        interval: iterations between two measurements.
        threshold: residual of any one matrix above which to warn. Converged iterations stay below
            0.01: damped eigenvalues are small and contribute no more.

    Raises:
        ValueError: an option is invalid; or, when training starts, the model has no softmax-free
            attention, or none that iterates (``solver='direct'``).
    """

    priority = "LOW"

    def __init__(self, interval: int = 100, threshold: float = 0.05):
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a positive integer, got {interval!r}")
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold!r}")
        self.interval = interval
        self.threshold = threshold
        self._warned = False
        self._watching = ExitStack()
        self._states: dict[tuple[int, int], BlockState] | None = None

    def before_train(self, runner: Runner) -> None:
        """Refuse a model without Newton-Raphson iteration."""
        layers = attention_blocks(runner.model).values()
        if all(layer.solver != "newton" for layer in layers):
            raise ValueError(
                "NewtonConvergenceHook needs a backbone with solver='newton'; this one has "
                "solver='direct', which does not iterate: remove the hook"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start recording at every ``interval``-th iteration."""
        self._watching.close()  # a forward pass that failed may have left it open
        self._states = None
        if is_main_process() and self.every_n_train_iters(runner, self.interval):
            self._states = self._watching.enter_context(capture(runner.model))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Compute, log, and warn the first time."""
        states, self._states = self._states, None
        self._watching.close()
        if states is None:
            return
        if not states:
            self._warn(runner, "saw no attention layer run: the model is compiled, or skips them")
            return
        stages: dict[int, list[torch.Tensor]] = {}
        for (stage, _), state in states.items():
            if state.layer.solver == "newton":
                stages.setdefault(stage, []).append(state.newton_residuals()[-1].flatten())
        scalars = {}
        for stage, residuals in sorted(stages.items()):
            every = torch.cat(residuals)
            scalars[f"newton_residual/stage{stage}"] = every.mean().item()
            scalars[f"newton_residual/stage{stage}_max"] = every.max().item()
            if not every.max() <= self.threshold:
                state = states[stage, 0]
                self._warn(runner, self._advice(stage, every.max().item(), state))
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _advice(self, stage: int, residual: float, state: BlockState) -> str:
        advice = "take solver='direct'"
        if state.layer.max_landmarks is None:
            advice += ", or a landmark budget such as max_landmarks=49"
        return (
            f"the inverse of stage {stage} does not converge: after {state.layer.newton_steps} "
            f"Newton-Raphson steps the residual is {residual:.2g}, above {self.threshold:g} "
            f"({state.landmarks.shape[2]} landmarks). If it stays there, {advice}, or more "
            "newton_steps. This warning is not repeated; newton_residual/* is still logged"
        )

    def _warn(self, runner: Runner, message: str) -> None:
        if not self._warned:
            self._warned = True
            print_log(f"NewtonConvergenceHook: {message}", logger=runner.logger, level=30)
