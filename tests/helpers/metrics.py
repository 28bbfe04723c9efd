"""How tests compare numbers and nested values."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor


def error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def same(a, b) -> bool:
    """Whether nested values are of the same types and equal, bit for bit."""
    if isinstance(a, HistoryBuffer):
        arrays = type(b) is HistoryBuffer and all(type(y) is np.ndarray for y in b.data)
        return arrays and same(a.data, b.data) and b.statistics("mean") == b.mean()
    if isinstance(a, np.ndarray):
        native = a.dtype.newbyteorder("=")
        return native == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Tensor):
        plain = (a, b) if a.layout == torch.strided else (a.to_dense(), b.to_dense())
        return a.dtype == b.dtype and a.layout == b.layout and torch.equal(*plain)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
