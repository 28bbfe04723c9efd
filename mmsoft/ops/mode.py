"""How a program runs: under transforms, traced, or for its result alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor

if hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    is_compiling = torch._dynamo.is_compiling

if hasattr(torch.library, "custom_op"):
    transforms_active = torch._C._are_functorch_transforms_active
else:  # torch.compile of before torch 2.4 knows no transforms, and does not understand the question

    def transforms_active() -> bool:
        """Whether a transform of ``torch.func`` is at work."""
        return not is_compiling() and torch._C._are_functorch_transforms_active()


get_proxy_mode: Callable[[], Any] = (
    getattr(proxy_tensor, "get_proxy_mode", None)
    or proxy_tensor.__dict__["get_innermost_proxy_mode"]
)  # before torch 2.3


def forward_mode() -> bool:
    """Whether forward-mode differentiation is at work, ``torch.func.jvp`` included.

    A custom operator drops tangents silently, and so does the ``jvp`` of an ``autograd.Function``
    in a nested transform: what has to be right is plain torch.
    """
    return forward_ad._current_level >= 0


def lacks_batch_rule() -> bool:
    """Whether ``torch.func.vmap`` may be at work that fused attention does not know."""
    return not hasattr(torch.library, "custom_op") and transforms_active()  # before torch 2.4


def constants() -> AbstractContextManager:
    """A context whose results have a derivative of 0, in reverse and in forward mode."""
    if not forward_mode():
        return torch.no_grad()
    both = ExitStack()
    both.enter_context(torch.no_grad())
    both.enter_context(forward_ad._set_fwd_grad_enabled(False))
    return both


def transformed() -> bool:
    """Whether any transform of ``torch.func``, or forward mode, is at work.

    Custom operators know neither: they raise, drop tangents, or run once for each sample.
    """
    return transforms_active() or forward_mode()


def traced(x: Tensor) -> bool:
    """Whether a program is being recorded: no number of tokens may then decide what it does.

    By ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx`` or with a fake ``x``.
    """
    if is_compiling() or torch.jit.is_tracing():
        return True
    return isinstance(x, FakeTensor) or get_proxy_mode() is not None


def recorded(x: Tensor) -> bool:
    """Whether a program is being recorded to run elsewhere: :func:`traced`, but not compiled."""
    # Before torch 2.7, which tells no difference, what torch.export records strictly is compiled.
    exported = getattr(torch.compiler, "_is_exporting_flag", False)
    return traced(x) and (exported or not is_compiling())


def may_set() -> bool:
    """Whether settings of the process, or an object, may change: a compiler cannot record it."""
    return not is_compiling()


def readable(x: Tensor) -> bool:
    """Whether asking for a value of ``x`` neither makes a device wait nor leaves a transform."""
    return x.device.type == "cpu" and not transformed()


def may_decide(x: Tensor) -> bool:
    """Whether a value of ``x`` may decide what happens: it is :func:`readable`, nothing records."""
    return not traced(x) and readable(x)


def cpu_shortcut(x: Tensor, *, backward: bool = False) -> bool:
    """Whether ``x`` may take a shortcut that pays on a CPU, in a program that is not traced.

    Args:
        x: the tensor to be worked on.
        backward: whether the shortcut can do with a backward pass; without, it is for evaluation.
    """
    if torch.is_grad_enabled() and not backward:
        return False
    return not traced(x) and x.device.type == "cpu"


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether tensors and parameters are dense and no subclasses, which may compute differently."""
    kinds = (Tensor, torch.nn.Parameter)
    return all(type(t) in kinds and t.layout == torch.strided for t in tensors)
