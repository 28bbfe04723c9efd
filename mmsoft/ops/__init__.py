"""Pure functions on tensors, built on torch alone."""

from .attention import softmax_free_attention
from .backends import use_backend
from .gaussian import gaussian_gram, gaussian_kernel, gaussian_kernel_product
from .inverse import newton_iterates, newton_raphson_pinv, step_size, tikhonov_pinv_product
from .landmarks import (
    choose_landmarks,
    landmark_candidates,
    landmark_centres,
    landmark_grid,
    landmark_patches,
    salient_mean,
)
from .softmax import landmark_attention, softmax_attention

__all__ = [
    "choose_landmarks",
    "gaussian_gram",
    "gaussian_kernel",
    "gaussian_kernel_product",
    "landmark_attention",
    "landmark_candidates",
    "landmark_centres",
    "landmark_grid",
    "landmark_patches",
    "newton_iterates",
    "newton_raphson_pinv",
    "salient_mean",
    "softmax_attention",
    "softmax_free_attention",
    "step_size",
    "tikhonov_pinv_product",
    "use_backend",
]
