"""A hook that asks for an implementation of the operators, such as the Triton kernels."""

import logging
from contextlib import ExitStack

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmsoft.ops import use_backend
from mmsoft.ops.launch import TRITON, refusal
from mmsoft.registry import HOOKS


@HOOKS.register_module()
class BackendHook(Hook):
    """Run with :func:`mmsoft.ops.use_backend`, from the start of a run to its end.

    It holds for the whole process, and beyond a run that ends with an error. In a config::

        custom_hooks = [dict(type='mmsoft.BackendHook')]  # the Triton kernels

    Args:
        backend: of which implementation.
        operations: the operations meant; by default all that have such an implementation.
        strict: raise where it refuses its arguments, instead of running what runs by default there.
            Where no Triton kernel can run at all, a warning says why.

    Raises:
        ValueError: there is no such implementation or operation.
    """

    priority = "VERY_HIGH"  # before hooks that run the model

    def __init__(
        self, backend: str = TRITON, operations: tuple[str, ...] = (), strict: bool = False
    ):
        self.backend, self.operations, self.strict = backend, operations, strict
        self._asking = ExitStack()
        with use_backend(backend, *operations):  # which knows the names
            pass

    def before_run(self, runner: Runner) -> None:
        """Ask for it."""
        reason = refusal(next(runner.model.parameters())) if self.backend == TRITON else None
        if reason is not None:
            message = f"BackendHook: no Triton kernel can run: {reason}"
            print_log(message, logger=runner.logger, level=logging.WARNING)
        asked = use_backend(self.backend, *self.operations, strict=self.strict)
        self._asking.enter_context(asked)

    def after_run(self, runner: Runner) -> None:
        """As before the run."""
        self._asking.close()
