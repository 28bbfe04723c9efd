"""Training: optimizer settings by parameter, what to watch, and runs that survive faults."""

from .checkpoint_hook import CheckpointHook
from .finite_gradient_hook import FiniteGradientHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .newton_convergence import NewtonConvergenceHook
from .random_state_hook import RandomStateHook

__all__ = [
    "CheckpointHook",
    "FiniteGradientHook",
    "LayerDecayOptimWrapperConstructor",
    "NewtonConvergenceHook",
    "RandomStateHook",
]
