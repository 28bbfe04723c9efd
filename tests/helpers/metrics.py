"""The error metric of the tests."""

from torch import Tensor


def error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())
