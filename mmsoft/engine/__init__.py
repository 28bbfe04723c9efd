"""Training: layer-wise learning rates, monitoring, kernels, and runs that survive faults."""

from .hooks import (
    BackendHook,
    CheckpointHook,
    FiniteGradientHook,
    NewtonConvergenceHook,
    RandomStateHook,
)
from .optimizers import LayerDecayOptimWrapperConstructor

__all__ = [
    "BackendHook",
    "CheckpointHook",
    "FiniteGradientHook",
    "LayerDecayOptimWrapperConstructor",
    "NewtonConvergenceHook",
    "RandomStateHook",
]
