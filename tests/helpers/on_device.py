"""Lets tests that name no device make their tensors on another one than the CPU."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch._decomp.decompositions_for_jvp  # scripts, at import, functions that make tensors
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _device

from mmsoft.ops.mode import is_compiling

RANDOM = ("rand", "randn", "randint", "randperm")


class OnDevice(ExitStack):
    """Within it, what creates a tensor and is not told where does so on ``device``.

    Unlike ``torch.device(device)`` random numbers are those of the CPU, with a generator or
    without, so that a test has the same ones everywhere; and it is no mode, under which
    ``torch.compile`` breaks graphs at what it compiles otherwise.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.device(device)

    def __enter__(self) -> "OnDevice":
        for function in _device._device_constructors():
            name = function.__name__
            if getattr(torch, name, None) is function:
                self.enter_context(patch.object(torch, name, _constructor(name, self.device)))
        return self


def _constructor(name: str, device: torch.device) -> Any:
    function, on_cpu = getattr(torch, name), name in RANDOM

    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None or _told_otherwise():
            return function(*args, **kwargs)
        if not on_cpu:
            return function(*args, **{**kwargs, "device": device})
        requires_grad = kwargs.pop("requires_grad", False)
        made = function(*args, **kwargs).to(device)
        return made.requires_grad_() if requires_grad else made

    return construct


def _told_otherwise() -> bool:
    """Whether we are within ``torch.device(...)``, too."""
    modes = [] if is_compiling() else _get_current_function_mode_stack()
    return any(isinstance(mode, _device.DeviceContext) for mode in modes)


def device_type() -> str:
    """``'cpu'``, or that of the context above: for autocast and for what is kept by device."""
    return torch.empty(0).device.type
