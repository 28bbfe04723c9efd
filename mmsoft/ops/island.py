"""The float32 island: arithmetic that neither autocast nor TF32 reaches, in either pass.

A backward pass runs under the autocast of the caller of ``backward()``, whatever the forward pass
ran under. Only products of matrices are affected, hence :func:`matmul`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .library import autocast_enabled, custom_op, has_fp32_precision
from .mode import forward_mode, may_set, transformed


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the island: float64 if any argument is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


TF32_DEVICES = {"cuda"}  # tests add the CPU


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Disable autocast on the device of ``x``, ``meta`` has none, and TF32 on a GPU."""
    device = x.device.type
    if device == "meta":
        return nullcontext()
    if device in TF32_DEVICES and may_set():
        return _no_tf32(device)
    return torch.autocast(device, enabled=False)


@contextmanager
def _no_tf32(device: str) -> Iterator[None]:
    """Disable autocast and, for products of matrices on a GPU, TF32: distances lose digits.

    The setting is the process's: with ``DataParallel``, one thread may end it for another.
    """
    with torch.autocast(device, enabled=False):
        restore = _disable_tf32()
        try:
            yield
        finally:
            restore()


def _disable_tf32() -> Callable[[], None]:
    """Disable TF32 for products; gives what sets it as it was.

    Since torch 2.9 it has two names. Where they agree, they go on to agree, because some of torch
    asks for the older one, TunableOp for one, which raises where they do not. No getter tells a
    setting from one that is inherited: set alike under ``torch.backends.fp32_precision``, it may
    follow that from then on.
    """
    products = torch.backends.cuda.matmul
    if _answer(lambda: products.allow_tf32):
        precision = _answer(torch.get_float32_matmul_precision)
        products.allow_tf32 = False
        return partial(_allow_tf32, medium=precision == "medium")
    if has_fp32_precision() and products.fp32_precision == "tf32":
        products.fp32_precision = "ieee"
        return partial(_set_precision, products, "tf32")
    return lambda: None


def _answer(getter: Callable[[], Any]) -> Any:
    """``None`` where the names disagree, for which torch raises."""
    try:
        return getter()
    except RuntimeError:
        return None


def _allow_tf32(medium: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # which calls it "high"
    if medium:  # of a CPU, too
        cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
        before = cpu and cpu.fp32_precision
        torch.set_float32_matmul_precision("medium")
        if cpu and cpu.fp32_precision != before:
            _set_precision(cpu, before)


def _set_precision(products: Any, value: str) -> None:
    products.fp32_precision = "none"  # and so what torch.backends.fp32_precision says
    if products.fp32_precision != value:
        products.fp32_precision = value


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    with no_autocast(a):
        return (a @ b).contiguous()


# An operator, so that a compiler too leaves its backward pass alone.
_matmul = custom_op("mmsoft::matmul")(_multiply)


@_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _matmul_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    a_needs, b_needs = ctx.needs_input_grad
    return matmul(grad, b.mT) if a_needs else None, matmul(a.mT, grad) if b_needs else None


_matmul.register_autograd(_matmul_backward, setup_context=_matmul_context)


def for_func(
    forward: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The same operator for ``torch.func``, which a custom operator knows nothing of."""
    parts = dict(forward=forward, setup_context=setup_context, backward=backward)
    static = {name: staticmethod(part) for name, part in parts.items()}
    return type(forward.__name__, (torch.autograd.Function,), static | {"generate_vmap_rule": True})


_Matmul = for_func(_multiply, _matmul_context, _matmul_backward)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of equal dtype, without autocast in any pass."""
    if forward_mode() or torch.jit.is_tracing():  # as get_flops does, which knows a plain product
        return _multiply(a, b)
    if a.shape[:-2] != b.shape[:-2]:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (t.expand(*batch, *t.shape[-2:]) for t in (a, b))
    return _Matmul.apply(a, b) if transformed() else torch.ops.mmsoft.matmul(a, b)


def recorded_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The same where a program is recorded, of operators that any runtime has.

    Recorded inside autocast, it is kept out of it. Whether a GPU that runs it takes TF32, and
    whether autocast is on then, who runs it decides.
    """
    # The meta device knows no autocast.
    outside = a.is_meta or not autocast_enabled(a.device.type)
    with nullcontext() if outside else no_autocast(a):
        return a @ b
