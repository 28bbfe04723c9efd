"""Inputs, attention rows and spectra of the attention layers of a model, from its images.

Start with :func:`capture`. :mod:`mmsoft.visualization` draws figures from them.
"""

from .capture import BlockState, KeptRows, attention_blocks, capture, choose_block
from .inference import ModelImage, capture_image, load_image, load_model
from .rows import (
    attention_rows,
    landmark_rows,
    nystromformer_rows,
    performer_rows,
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
    "capture",
    "capture_image",
    "choose_block",
    "inverse_filter",
    "landmark_regions",
    "landmark_rows",
    "load_image",
    "load_model",
    "newton_residuals",
    "nystromformer_rows",
    "performer_rows",
    "softmax_rows",
    "spectrum",
]
