"""Training: layer-wise learning rates, monitoring, and runs that survive faults."""

from .hooks import CheckpointHook, FiniteGradientHook, NewtonConvergenceHook, RandomStateHook
from .optimizers import LayerDecayOptimWrapperConstructor

__all__ = [
    "CheckpointHook",
    "FiniteGradientHook",
    "LayerDecayOptimWrapperConstructor",
    "NewtonConvergenceHook",
    "RandomStateHook",
]
