"""Finds where a GPU would make the program wait: a value that is asked for, or a copy to it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU, raise where the program would wait for it, in either pass and in any thread."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class NoTransfers(TorchDispatchMode):
    """Raise where one device's tensor is copied to another.

    On the meta device, which has no values to ask for either, this finds without a GPU what makes a
    program wait for one, but for what is inside a custom operator.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if isinstance(out, Tensor) and out.device != source.device:
                raise RuntimeError(f"a tensor goes from {source.device} to {out.device}")
        return out
