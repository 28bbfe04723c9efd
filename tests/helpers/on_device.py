"""Lets tests that name no device make their tensors on another one than the CPU."""

from typing import Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}


class OnDevice(DeviceContext):
    """Within it, what creates a tensor and is not told where does so on ``device``.

    Unlike ``torch.device(device)`` random numbers are those of the CPU, with a generator or
    without, so that a test has the same ones everywhere.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in RANDOM or kwargs.get("device") is not None:
            return super().__torch_function__(func, types, args, kwargs)
        assert func in _device_constructors()
        requires_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)


def device_type() -> str:
    """``'cpu'``, or that of the mode above: for autocast and for what is kept by device."""
    return torch.empty(0).device.type
