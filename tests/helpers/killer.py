"""A hook that kills its own process, as `kill -9` would, at a chosen point of a training run.

Imported by the configs of test_kill_and_resume.py. The environment variable MMSOFT_TEST_KILL names
the point: `iteration N SECONDS`, `write N FRACTION`, `rename N`, `pointer N`, `remove N`,
`evaluation N`; N counts from the start of the process.
"""

import builtins
import os
import signal
import threading
import time

from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # never reached


def on_call(owner, name, number, when, action):
    """Replace a function: at call `number` of those that `when` accepts, do `action` instead."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def replacement(*args, **kwargs):
        if when(*args, **kwargs) and next(calls) == number:
            action(original, *args, **kwargs)
            die()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


@HOOKS.register_module()
class Killer(Hook):
    def __init__(self):
        where, *numbers = os.environ.get("MMSOFT_TEST_KILL", "never").split()
        self.where, self.numbers = where, [float(number) for number in numbers]
        number = int(self.numbers[0]) if numbers else 0

        def is_weights(*args):
            return ".pth" in str(args[-1])

        def is_pointer(*args, **kwargs):
            return "last_checkpoint" in str(args[:1]) and "w" in str(args[1:2])

        def half(original, backend, data, path):
            with builtins.open(path, "wb") as file:
                file.write(data[: int(len(data) * self.numbers[1])])

        def truncate(original, path, mode="r", *args, **kwargs):
            original(path, mode)  # emptied, nothing written yet

        if where == "write":
            on_call(LocalBackend, "put", number, lambda *args: is_weights(*args), half)
        elif where == "rename":
            on_call(os, "replace", number, is_weights, lambda original, *args: original(*args))
        elif where == "remove":
            on_call(LocalBackend, "remove", number, is_weights, lambda *args: None)
        elif where == "pointer":
            on_call(builtins, "open", number, is_pointer, truncate)

    def _reached(self, where):
        if self.where == where:
            self.numbers[0] -= 1
            return self.numbers[0] == -1
        return False

    def before_train_iter(self, runner, *args, **kwargs):
        if self._reached("iteration"):
            threading.Timer(self.numbers[1], die).start()

    def after_val_iter(self, runner, *args, **kwargs):
        if self._reached("evaluation"):
            die()
