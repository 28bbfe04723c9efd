"""A GPU that is not there: tensors of the CPU that behave as if they were on another device.

They say that they are on ``cuda:0``, give no NumPy array, and do not meet tensors of the CPU in an
operation, as those of a GPU do not; their numbers are those of the CPU. So a test that makes a
tensor on the wrong device fails without a GPU. What is compiled, transforms of ``torch.func``,
checkpointing (a backward pass leaves the mode), Triton's kernels and mmcv's operators cannot be
pretended.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

GPU = torch.device("cuda:0")
aten = torch.ops.aten
# Take tensors of both, as they do on a GPU.
MIXED = {aten._to_copy, aten.copy_, aten.index, aten.index_put_, aten._index_put_impl_}
MIXED |= {aten.index_put}  # the gradient of an index, whose zeros torch makes by itself
# What records a program, or makes tensors where torch's C++ takes the arguments to be.
UNKNOWN = [(torch, "compile"), (torch.export, "export"), (torch.jit, "trace")]
UNKNOWN += [(torch.utils.checkpoint, "checkpoint"), (torch.library, "opcheck")]
UNKNOWN += [(FakeTensorMode, "__enter__"), (forward_ad, "make_dual")]


class Pretended(Tensor):
    """A tensor of the CPU, ``kept``, as one of the GPU."""

    kept: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor) -> "Pretended":
        if type(kept) is not Tensor:
            raise TypeError(f"a tensor of the CPU is needed, got {type(kept).__name__}")
        length = kept.untyped_storage().nbytes() // kept.element_size()
        shell = torch.empty(length, dtype=kept.dtype, device="meta")
        shell = shell.as_strided(kept.shape, kept.stride(), kept.storage_offset())
        new = Tensor._make_subclass(
            cls, shell, False, dispatch_device=True, device_for_backend_keys=torch.device("cpu")
        )
        new.kept = kept
        return new

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.kept.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket not in MIXED:
            _check(func, (args, kwargs))
        out = func(*tree_map(_kept, args), **tree_map(_kept, kwargs))
        return _returned(func, args, kwargs, tree_map(_pretended, out))


def _check(func: Any, arguments: Any) -> None:
    devices = set()

    def look(x: Any) -> None:
        if isinstance(x, Tensor) and (isinstance(x, Pretended) or x.dim() > 0):
            devices.add(str(x.device))

    tree_map(look, arguments)
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors are on {' and '.join(sorted(devices))}")


def _kept(x: Any) -> Any:
    return x.kept if isinstance(x, Pretended) else x


def _pretended(x: Any) -> Any:
    return Pretended(x) if type(x) is Tensor and x.device.type == "cpu" else x


def _returned(func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
    """With what an operation in place returns as the argument that it is."""
    schema = func._schema
    if not schema.is_mutable or not schema.returns:
        return out
    given = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
    written = {
        str(argument.alias_info.before_set): given.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    outs = [
        value
        if result.alias_info is None
        else written.get(str(result.alias_info.before_set), value)
        for result, value in zip(schema.returns, out if isinstance(out, tuple) else (out,))
    ]
    return tuple(outs) if isinstance(out, tuple) else outs[0]


class _Functions(TorchFunctionMode):
    """Makes on the CPU what is to be made on the GPU, which torch would have to start."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._are_functorch_transforms_active():  # whose tensors say where torch takes us
            pytest.skip("no transform of torch.func knows a GPU that is pretended")
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _to(func, *args, **kwargs)
        if func is scaled_dot_product_attention and any(x.numel() == 0 for x in args[:3]):
            # For these torch makes zeros, by itself where its C++ takes the tensors to be.
            return _Moved.apply(func(*tree_map(_moved, args), **tree_map(_moved, kwargs)))
        if func is Tensor.tolist:  # which no subclass has
            return _kept(args[0]).tolist()
        if func == Tensor.grad.__get__ and isinstance(args[0], Pretended):
            return _pretended(func(*args))  # zeros of torch itself
        if func is Tensor.new_tensor and isinstance(args[0], Pretended):
            like, data = args[0], tree_map(_kept, args[1])
            return Pretended(torch.tensor(data, **{"dtype": like.dtype, **kwargs, "device": "cpu"}))
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            # torch itself takes them for tensors of the CPU, and so says of those that stay.
            asked = device is not None and torch.device(device).type == "cpu"
            return func(*(tree_map(_kept, args) if asked else args), **kwargs)
        kwargs["device"] = "cpu"
        if func not in _device_constructors():  # zeros_like, new_zeros
            made = func(*map(_kept, args), **kwargs)
            return Pretended(made)
        args = tree_map(_kept, args)  # torch.tensor
        requires_grad = kwargs.pop("requires_grad", False)
        return Pretended(func(*args, **kwargs)).requires_grad_(requires_grad)


class _Moved(torch.autograd.Function):
    """From one to the other, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.kept.clone() if isinstance(x, Pretended) else Pretended(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.kept.clone() if isinstance(grad, Pretended) else Pretended(grad.clone())


def _moved(x: Any) -> Any:
    return _Moved.apply(x) if isinstance(x, Pretended) else x


def _to(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = (*args, *kwargs.values())
    if func is not Tensor.to:
        to, dtypes = func is Tensor.cuda, []
    else:
        devices = [
            arg.device if isinstance(arg, Tensor) else torch.device(arg)
            for arg in given
            if isinstance(arg, (str, torch.device, Tensor))
        ]
        if not devices or devices[0].type not in ("cpu", "cuda"):
            return func(x, *args, **kwargs)
        to = devices[0].type == "cuda"
        dtypes = [
            arg.dtype if isinstance(arg, Tensor) else arg
            for arg in given
            if isinstance(arg, (torch.dtype, Tensor))
        ]
    moved = x if isinstance(x, Pretended) == to else _Moved.apply(x)
    options = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
    return func(moved, *dtypes, **options) if dtypes or (options and func is Tensor.to) else moved


class _Autocast(torch.autocast):
    """That of a CPU, and its choice of operations."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _without_grad(mode: bool = True) -> Any:
    """In the place of inference mode, whose tensors take no subclass."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and not mode)


def _unknown(name: str) -> Any:
    """A function for each: Dynamo knows torch's functions apart."""
    return lambda *_, **__: pytest.skip(f"{name} does not run on a GPU that is pretended")


@contextmanager
def pretended() -> Iterator[None]:
    """Within it there is such a GPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "autocast", _Autocast))
        stack.enter_context(patch.object(torch.amp, "autocast", _Autocast))
        stack.enter_context(patch.object(torch, "inference_mode", _without_grad))
        stack.enter_context(_Functions())
        for name in ("gradcheck", "gradgradcheck"):  # zeros for no gradient, of torch itself
            check = partial(getattr(torch.autograd, name), check_undefined_grad=False)
            stack.enter_context(patch.object(torch.autograd, name, check))
        unknown = [each for each in UNKNOWN if hasattr(*each)]  # opcheck is of torch 2.4
        operators = sys.modules.get("mmcv._ext", object())
        unknown += [(operators, name) for name in dir(operators) if not name.startswith("_")]
        for owner, name in unknown:
            stack.enter_context(patch.object(owner, name, _unknown(name)))
        # Module.double() and others: with new parameters, not with new data of the same.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        yield
