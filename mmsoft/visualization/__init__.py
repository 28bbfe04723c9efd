"""The papers' figures, drawn from the numbers that :mod:`mmsoft.analysis` gives."""

from .attention import draw_attention
from .budgets import draw_budgets
from .convergence import draw_convergence
from .landmarks import draw_landmarks
from .learning import draw_learning
from .memory import draw_memory
from .predictions import draw_comparison, draw_predictions
from .spectrum import draw_spectrum
from .style import save_figure
from .tradeoff import draw_tradeoff

__all__ = [
    "draw_attention",
    "draw_budgets",
    "draw_comparison",
    "draw_convergence",
    "draw_landmarks",
    "draw_learning",
    "draw_memory",
    "draw_predictions",
    "draw_spectrum",
    "draw_tradeoff",
    "save_figure",
]
