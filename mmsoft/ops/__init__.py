"""Pure functions on tensors, built on torch alone."""

from .attention import softmax_free_attention
from .gaussian import gaussian_kernel, gaussian_kernel_product
from .inverse import newton_raphson_pinv, step_size, tikhonov_pinv_product

__all__ = [
    "gaussian_kernel",
    "gaussian_kernel_product",
    "newton_raphson_pinv",
    "softmax_free_attention",
    "step_size",
    "tikhonov_pinv_product",
]
