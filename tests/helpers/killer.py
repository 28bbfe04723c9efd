"""The end of a training run at a chosen point, and a hook that ends its own process like `kill -9`.

The configs of test_kill_and_resume.py import it. The environment variable MMSOFT_TEST_KILL names
the point: `iteration N SECONDS`, `write N FRACTION`, `rename N`, `pointer N`, `remove N`,
`evaluation N`; N counts from the start of the process.
"""

import builtins
import itertools
import os
import signal
import threading
import time
from pathlib import Path

from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def is_weights(*args):
    return ".pth" in str(args[-1])


def is_pointer(path, mode="r", *args, **kwargs):
    return str(path).endswith("last_checkpoint") and mode == "w"


# MMEngine's steps of a save and ours, in this order.
STEPS = dict(
    write=(LocalBackend, "put", is_weights),
    rename=(os, "replace", is_weights),
    pointer=(builtins, "open", is_pointer),
    remove=(LocalBackend, "remove", is_weights),
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # never reached


def end_at(step, number, when, end=die, share=0.5, replace=setattr):
    """Call `end` before, in (a `share` is written) or after call `number` (from 0) of a step."""
    owner, attribute, is_meant = STEPS[step]
    original, calls = getattr(owner, attribute), itertools.count()

    def replacement(*args, **kwargs):
        if not is_meant(*args, **kwargs) or next(calls) != number:
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        elif when == "in":
            data, path = args[1:] if step == "write" else (b"", args[0])
            Path(path).write_bytes(data[: int(len(data) * share)])
        return end()

    replace(owner, attribute, replacement)


@HOOKS.register_module()
class Killer(Hook):
    def __init__(self):
        where, *numbers = os.environ.get("MMSOFT_TEST_KILL", "never").split()
        self.where, self.numbers = where, [float(number) for number in numbers]
        if where in STEPS:
            when = dict(write="in", rename="after", pointer="in", remove="before")[where]
            end_at(where, int(self.numbers[0]), when, share=self.numbers[-1])

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
