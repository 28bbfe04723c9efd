"""What the Triton kernels share: what they refuse, when they are imported, how many programs run.

Triton itself is imported by the modules of kernels alone, when the first of them runs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from os import environ
from typing import Any

import torch
from torch import Tensor

TRITON = "triton"
DEVICES = {"cuda"}
if environ.get("TRITON_INTERPRET") == "1":  # Triton's own switch: its interpreter takes these
    DEVICES.add("cpu")
CAPABILITY = (8, 0)
OLDEST = (3, 4)  # Triton; torch before 2.8 has one of its own that is older
_BLOCK = 128  # rows of the largest block
_PROGRAMS = 4  # for each multiprocessor, so that none idles at the end


def lazily(module: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of ``module``, which is imported at the first call."""

    def run(*args: Any) -> Any:
        function = getattr(import_module(module), name)
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda":
            return function(*args)
        with torch.cuda.device(device):  # Triton launches on the current one
            return function(*args)

    return run


def refusal(*tensors: Tensor) -> str | None:
    """Why no kernel takes these tensors; ``None`` if one may."""
    device = tensors[0].device
    if device.type not in DEVICES:
        return f"the tensors are on {device.type}, not on cuda"
    if (reason := lacking()) is not None:
        return reason
    if any(t.dtype == torch.float64 for t in tensors):
        return "an argument is float64"
    if any(t.numel() == 0 for t in tensors):
        return "an argument is empty"
    if any(t.device != device for t in tensors):
        return "the tensors are on several devices"
    # Kernels count rows and channels within a block in 32 bits, all else in 64.
    if any(_reach(t) >= 2**31 for t in tensors):
        return f"{_BLOCK} rows reach over 2^31 elements or more"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are written for NVIDIA GPUs"
        found = capability(device)
        if found < CAPABILITY:
            return f"compute capability {found[0]}.{found[1]} is below 8.0"
    return None


def _reach(tensor: Tensor) -> int:
    """From the first element of a block of rows to its last."""
    last = zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True)
    return sum((min(size, _BLOCK) - 1) * stride for size, stride in last)


@lru_cache(None)
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; of another device one that has all."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (99, 0)


@lru_cache(None)
def lacking() -> str | None:
    """Why no kernel runs in this environment; ``None`` if Triton is there and new enough."""
    if find_spec("triton") is None:
        return 'Triton is not installed; pip install "mmsoft[triton]"'
    try:
        found = version("triton")
    except PackageNotFoundError:  # a build under another name
        return None
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, OLDEST))}: update torch"
    return None


def misfit(*wanted: tuple[Tensor, Sequence[int]]) -> str | None:
    """Which tensor has not the shape that is wanted of it; plain torch may broadcast it."""
    for tensor, shape in wanted:
        if tuple(tensor.shape) != tuple(shape):
            return f"an argument has shape {tuple(tensor.shape)}, not {tuple(shape)}"
    return None


def splits(tensor: Tensor, programs: int, blocks: int) -> int:
    """In how many parts to walk ``blocks`` so that ``programs`` times as many fill the device."""
    return max(1, min(blocks, -(-_PROGRAMS * _processors(tensor.device) // programs)))


@lru_cache(None)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
