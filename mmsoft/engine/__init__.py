"""Training: optimizer settings by parameter, and what to watch."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .newton_convergence import NewtonConvergenceHook

__all__ = ["LayerDecayOptimWrapperConstructor", "NewtonConvergenceHook"]
