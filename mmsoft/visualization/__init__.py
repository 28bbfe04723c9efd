"""The papers' figures of one's own model: numbers from tensors, and figures from the numbers.

The tools under ``tools/analysis_tools`` are made of these; in a notebook, start with
:func:`capture`.
"""

from .capture import BlockState, attention_blocks, capture, choose_block
from .figures import (
    draw_attention,
    draw_convergence,
    draw_landmarks,
    draw_memory,
    draw_spectrum,
    draw_tradeoff,
    save_figure,
)
from .inference import ModelImage, load_image, load_model
from .rows import attention_rows, nystromformer_rows, performer_rows, softmax_rows
from .spectra import inverse_filter, landmark_regions, newton_residuals, spectrum

__all__ = [
    "BlockState",
    "ModelImage",
    "attention_blocks",
    "attention_rows",
    "capture",
    "choose_block",
    "draw_attention",
    "draw_convergence",
    "draw_landmarks",
    "draw_memory",
    "draw_spectrum",
    "draw_tradeoff",
    "inverse_filter",
    "landmark_regions",
    "load_image",
    "load_model",
    "newton_residuals",
    "nystromformer_rows",
    "performer_rows",
    "save_figure",
    "softmax_rows",
    "spectrum",
]
