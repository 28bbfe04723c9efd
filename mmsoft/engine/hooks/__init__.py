"""Hooks for MMEngine's runner, each enabled by its name in a config."""

from .backend import BackendHook
from .checkpoint import CheckpointHook
from .finite_gradient import FiniteGradientHook
from .newton_convergence import NewtonConvergenceHook
from .random_state import RandomStateHook

__all__ = [
    "BackendHook",
    "CheckpointHook",
    "FiniteGradientHook",
    "NewtonConvergenceHook",
    "RandomStateHook",
]
