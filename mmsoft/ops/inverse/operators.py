"""The custom operators: signatures, shapes and gradients, whatever computes them."""

from typing import Any

import torch
from torch import Tensor

from ..backends import EAGER, Implementation, Operation
from ..island import for_func, matmul, no_autocast
from ..launch import TRITON, lazily, misfit, refusal
from ..library import custom_op
from ..mode import forward_mode, transformed
from . import eager

_TRITON = "mmsoft.ops.inverse.triton"
_LANDMARKS, _CHANNELS = 128, 64  # what fits on chip


def _refusal(a: Tensor, *others: Any) -> str | None:
    tensors = [a, *(t for t in others if isinstance(t, Tensor))]
    if any(t.dim() != 4 for t in tensors):
        return "an argument has not 4 dimensions"
    if a.shape[-1] > _LANDMARKS:
        return f"there are more than {_LANDMARKS} landmarks"
    if max(t.shape[-1] for t in tensors[1:] or [a]) > _LANDMARKS:
        return f"there are more than {_LANDMARKS} columns"
    if any(t.dtype != torch.float32 for t in tensors):
        return "an argument is not float32"
    return refusal(*tensors) or misfit((a, (*a.shape[:2], a.shape[3], a.shape[3])))


def _refusal_newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, _: int) -> str | None:
    factors = [t for t in (alpha, cubic) if t is not None]
    if any(t.dtype != torch.float32 for t in factors):
        return "an argument is not float32"
    if (reason := _refusal(a) or refusal(a, *factors)) is not None:
        return reason
    whole = (1, 1, a.shape[1], a.shape[0])  # from the last dimension on
    for t in factors:
        if t.dim() > 4 or any(n not in (1, w) for n, w in zip(reversed(t.shape), whole)):
            return f"an argument has shape {tuple(t.shape)}, not one number for each matrix"
    return None


def _refusal_newton_backward(x: Tensor, grad: Tensor) -> str | None:
    return _refusal(x, grad) or misfit((grad, x.shape))


def _refusal_solve(a: Tensor, mu: Tensor, b: Tensor) -> str | None:
    reason = _refusal(a, mu, b)
    if reason is None and b.shape[3] > _CHANNELS:
        return f"there are more than {_CHANNELS} channels"
    return reason or misfit((mu, (*mu.shape[:2], 1, 1)), (b, (*a.shape[:3], b.shape[3])))


def _refusal_solve_backward(a: Tensor, x: Tensor, y: Tensor) -> str | None:
    reason = _refusal(a, x, y)
    if reason is None and y.shape[3] > _CHANNELS:
        return f"there are more than {_CHANNELS} channels"
    return reason or misfit((x, y.shape), (y, (*a.shape[:3], y.shape[3])))


NEWTON = Operation(
    "newton_raphson_pinv",
    Implementation(TRITON, lazily(_TRITON, "newton"), _refusal_newton, on_request=True),
    Implementation(EAGER, eager.newton),
)
NEWTON_BACKWARD = Operation(
    "newton_raphson_pinv_backward",
    Implementation(
        TRITON, lazily(_TRITON, "newton_backward"), _refusal_newton_backward, on_request=True
    ),
    Implementation(EAGER, eager.newton_backward),
)
SOLVE = Operation(
    "tikhonov_solve",
    Implementation(TRITON, lazily(_TRITON, "solve"), _refusal_solve, on_request=True),
    Implementation(EAGER, eager.solve),
)
SOLVE_BACKWARD = Operation(
    "tikhonov_solve_backward",
    Implementation(
        TRITON, lazily(_TRITON, "solve_backward"), _refusal_solve_backward, on_request=True
    ),
    Implementation(EAGER, eager.solve_backward),
)


@custom_op("mmsoft::newton_raphson_pinv")
def _newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    return NEWTON(a, alpha, cubic, steps)


@_newton.register_fake
def _(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _newton_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _newton_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (x,) = ctx.saved_tensors
    return newton_backward(x, grad), None, None, None


_newton.register_autograd(_newton_gradients, setup_context=_newton_context)
_Newton = for_func(eager.newton, _newton_context, _newton_gradients)


def newton(a: Tensor, alpha: Tensor | None, cubic: Tensor | None, steps: int) -> Tensor:
    """:func:`mmsoft.ops.newton_raphson_pinv`; without ``alpha`` and ``cubic``, the guarded ones."""
    if not NEWTON.gives_way(transformed()):
        return torch.ops.mmsoft.newton_raphson_pinv(a, alpha, cubic, steps)
    if alpha is None or cubic is None:
        alpha, cubic = eager.step_size(a.detach())
    if not forward_mode():
        return _Newton.apply(a, alpha, cubic, steps)
    with no_autocast(a):
        x = eager.newton(a.detach(), alpha.detach(), cubic.detach(), steps)
        # (I + X (A - A))^-1 X: the value is X, and every derivative follows from dX = -X dA X.
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return torch.linalg.inv(eye + x @ (a - a.detach())) @ x


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@custom_op("mmsoft::newton_raphson_pinv_backward")
def _newton_backward(x: Tensor, grad: Tensor) -> Tensor:
    return NEWTON_BACKWARD(x, grad)


@_newton_backward.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _newton_second(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, g = ctx.saved_tensors
    dx = matmul(matmul(g, x.mT), grad.mT) + matmul(matmul(grad.mT, x.mT), g)
    return -dx, newton_backward(x.mT, grad)


_newton_backward.register_autograd(_newton_second, setup_context=_save_inputs)


def newton_backward(x: Tensor, grad: Tensor) -> Tensor:
    """``-X^T G X^T``."""
    if NEWTON_BACKWARD.gives_way(transformed()):
        return eager.newton_backward(x, grad)
    return torch.ops.mmsoft.newton_raphson_pinv_backward(x, grad)


@custom_op("mmsoft::tikhonov_solve")
def _solve(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    return SOLVE(a, mu, b)


@_solve.register_fake
def _(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _solve_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, mu, _ = inputs
    ctx.save_for_backward(a, mu, output)


def _solve_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    a, mu, x = ctx.saved_tensors
    y = tikhonov_solve(a, mu, grad)
    return solve_backward(a, x, y), None, y


_solve.register_autograd(_solve_gradients, setup_context=_solve_context)
_Solve = for_func(eager.solve, _solve_context, _solve_gradients)


def tikhonov_solve(a: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    """``(A^2 + mu^2 I)^-1 b``."""
    if not SOLVE.gives_way(transformed()):
        return torch.ops.mmsoft.tikhonov_solve(a, mu, b)
    if not forward_mode():
        return _Solve.apply(a, mu, b)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    with no_autocast(a):
        # Not linalg.solve, whose second derivative in forward mode is wrong (torch 2.13).
        return torch.linalg.inv(a @ a + mu.square() * eye) @ b


@custom_op("mmsoft::tikhonov_solve_backward")
def _solve_backward(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return SOLVE_BACKWARD(a, x, y)


@_solve_backward.register_fake
def _(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _solve_second(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, x, y = ctx.saved_tensors
    both = matmul(grad.mT, a) + matmul(a.mT, grad.mT)
    da = matmul(matmul(grad.mT, y), x.mT) + matmul(matmul(grad, x), y.mT)
    return -da, -matmul(both, y), -matmul(both.mT, x)


_solve_backward.register_autograd(_solve_second, setup_context=_save_inputs)


def solve_backward(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``-(Y X^T A^T + A Y X^T)``."""
    if SOLVE_BACKWARD.gives_way(transformed()):
        return eager.solve_backward(a, x, y)
    return torch.ops.mmsoft.tikhonov_solve_backward(a, x, y)
