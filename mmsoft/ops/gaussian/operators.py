"""The custom operators: signatures, shapes and gradients, whatever computes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import EAGER, Implementation, Operation
from ..island import compute_dtype, matmul, no_autocast
from ..launch import TRITON, lazily, misfit, refusal
from ..library import custom_op
from ..mode import forward_mode, transformed
from . import eager
from .kernel import empty_gradients, empty_like_tokens, gaussian_kernel

_TRITON = "mmsoft.ops.gaussian.triton"
_CHANNELS = 64  # what fits on chip


def _refusal(x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None, *others: Any) -> str | None:
    tensors = (x, y, w) if unit is None else (x, y, w, unit)
    if any(t.dim() != 4 for t in tensors):
        return "an argument has not 4 dimensions"
    if max(t.shape[-1] for t in tensors) > _CHANNELS:
        return f"there are more than {_CHANNELS} channels"
    (*batch, _, d), (*_, m, width) = x.shape, w.shape
    wanted = [(y, (*batch, m, d)), (w, (*batch, m, width))]
    if unit is not None:
        wanted.append((unit, (batch[0], 1, 1, 1)))
    return refusal(*tensors) or misfit(*wanted)


def _refusal_backward(grad: Tensor, x: Tensor, y: Tensor, w: Tensor, *others: Any) -> str | None:
    reason = _refusal(x, y, w, *others)
    return reason or refusal(x, grad) or misfit((grad, (*x.shape[:3], w.shape[3])))


PRODUCT = Operation(
    "gaussian_kernel_product",
    Implementation(TRITON, lazily(_TRITON, "product"), _refusal, on_request=True),
    Implementation(EAGER, eager.product),
)
BACKWARD = Operation(
    "gaussian_kernel_product_backward",
    Implementation(TRITON, lazily(_TRITON, "product_backward"), _refusal_backward, on_request=True),
    Implementation(EAGER, eager.product_backward),
)


@custom_op("mmsoft::gaussian_kernel_product")
def _product(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False
) -> Tensor:
    return PRODUCT(x, y, w, unit, divide)


@_product.register_fake
def _(x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None = None, divide: bool = False) -> Tensor:
    return empty_like_tokens(x, w.shape[-1], compute_dtype(x, y, w))


@custom_op("mmsoft::gaussian_kernel_product_backward")
def _product_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    unit: Tensor | None,
    divide: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(grad, x, y, w, unit, divide, needs)


@_product_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    unit: Tensor | None,
    divide: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    return empty_gradients((x, y, w), compute_dtype(x, y, w), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.divide = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if forward_mode():
        raise NotImplementedError(
            "the backward pass of gaussian_kernel_product has no forward-mode derivative; compute "
            "the forward pass under forward mode too, as torch.func.jvp of torch.func.grad does"
        )
    *inputs, unit = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.mmsoft.gaussian_kernel_product_backward(
        grad, *inputs, unit, ctx.divide, needs
    )
    grads = (g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needs))
    return *grads, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "gaussian_kernel_product has no second derivative; differentiate "
        "mmsoft.ops.reference.softmax_free_attention instead"
    )


_product.register_autograd(_backward, setup_context=_setup_context)
_product_backward.register_autograd(_no_double_backward)


def product_in_units(
    x: Tensor, y: Tensor, w: Tensor, unit: Tensor | None, *, divide: bool
) -> Tensor:
    """``K (w / unit)`` if ``divide``, else ``unit * (K w)``: nothing in between can overflow.

    ``K^T (v / unit)`` stands for ``unit`` times itself, whose cotangent it takes outside
    :func:`transformed`. The gradient of queries (``y`` if ``divide``, else ``x``) is multiplied by
    the unit here, that of landmarks by the caller, and that of ``w`` not at all; the reason is in
    ``docs/method.md``. Shapes are those of :func:`gaussian_kernel_product`; the unit is from
    :func:`unit_of`, ``None`` for 1.
    """
    if not (PRODUCT.gives_way(transformed()) and BACKWARD.gives_way(True)):
        return torch.ops.mmsoft.gaussian_kernel_product(x, y, w, unit, divide)
    with no_autocast(x):
        dtype = compute_dtype(x, y, w)
        w = w.to(dtype)
        if unit is not None and divide:
            w = w / unit
        out = matmul(gaussian_kernel(x.to(dtype), y.to(dtype)), w)
        return out if unit is None or divide else unit * out
