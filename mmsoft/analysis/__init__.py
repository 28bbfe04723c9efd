"""Inputs, attention rows and spectra of a model's attention layers; where a detector goes wrong.

Start with :func:`capture`. :mod:`mmsoft.visualization` draws figures from them.
"""

from .capture import BlockState, KeptRows, attention_blocks, capture, choose_block
from .choice import even_choice, evenly
from .inference import ModelImage, capture_image, load_image, load_model
from .precision import average_precisions, by_side
from .rows import (
    attention_rows,
    landmark_rows,
    nystromformer_rows,
    performer_rows,
    rows_inside,
    softmax_rows,
)
from .spectra import inverse_filter, landmark_regions, newton_residuals, spectrum
from .usage import Usage, attention_usage

__all__ = [
    "BlockState",
    "KeptRows",
    "ModelImage",
    "Usage",
    "attention_blocks",
    "attention_rows",
    "attention_usage",
    "average_precisions",
    "by_side",
    "capture",
    "capture_image",
    "choose_block",
    "even_choice",
    "evenly",
    "inverse_filter",
    "landmark_regions",
    "landmark_rows",
    "load_image",
    "load_model",
    "newton_residuals",
    "nystromformer_rows",
    "performer_rows",
    "rows_inside",
    "softmax_rows",
    "spectrum",
]
