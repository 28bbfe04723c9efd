"""What this package needs of torch that its older versions, from 2.1 on, have elsewhere or lack."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
HAS_CUSTOM_OPERATORS = hasattr(torch.library, "custom_op")  # and more that came with torch 2.4
HAS_CPU_FLOAT16 = TORCH >= (2, 3)


def autocast_enabled(device: str) -> bool:
    """Whether autocast is at work on a type of device."""
    if HAS_CUSTOM_OPERATORS:
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def cpu_autocast_dtype() -> torch.dtype | None:
    """The dtype of autocast on a CPU, ``None`` if it is not at work."""
    if not autocast_enabled("cpu"):
        return None
    if HAS_CUSTOM_OPERATORS:
        return torch.get_autocast_dtype("cpu")
    return torch.get_autocast_cpu_dtype()


def check_float16(dtype: torch.dtype, device: str) -> None:
    """Raise TypeError where torch would name an operation of its own that it has not in float16."""
    if not HAS_CPU_FLOAT16 and dtype == torch.float16 and device == "cpu":
        raise TypeError(
            f"float16 on a CPU needs torch>=2.3, but torch {torch.__version__} is installed: use "
            "float32 or bfloat16"
        )


# Of sizes that may be symbols, which the plain ones would ask for their value. Of those that are
# known, torch 2.6 and 2.11 compile the plain ones alone; torch.jit.trace has tensors for sizes.
_PLAIN = TORCH < (2, 12)


def _takes_plain(*sizes: int) -> bool:
    if any(isinstance(size, Tensor) for size in sizes):
        return True
    return _PLAIN and not any(isinstance(size, torch.SymInt) for size in sizes)


def larger(size: int, other: int) -> int:
    """The larger of two sizes."""
    return max(size, other) if _takes_plain(size, other) else torch.sym_max(size, other)


def smaller(size: int, other: int) -> int:
    """The smaller of two sizes."""
    return min(size, other) if _takes_plain(size, other) else torch.sym_min(size, other)


def has_fp32_precision() -> bool:
    """Whether TF32 has its newer name, with which the older one can disagree."""
    try:
        return hasattr(torch.backends.cuda.matmul, "fp32_precision")
    except AssertionError:  # for an AttributeError, before torch 2.4
        return False


# ----------------------------------------------------------------------------- custom operators

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
    Sequence[bool]: "bool[]",
}


def _schema(function: Callable) -> str:
    signature = inspect.signature(function)
    arguments = []
    for name, parameter in signature.parameters.items():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        arguments.append(f"{_TYPES[parameter.annotation]} {name}{default}")
    returned = signature.return_annotation
    results = [_TYPES[kind] for kind in getattr(returned, "__args__", (returned,))]
    return f"({', '.join(arguments)}) -> ({', '.join(results)})"


class CustomOperator:
    """What ``torch.library.custom_op`` gives, for torch before 2.4, as far as we use it.

    Args:
        name: ``'namespace::name'``.
        function: with annotated arguments, which computes it.
    """

    libraries: ClassVar[dict[str, torch.library.Library]] = {}  # registered while they are held

    def __init__(self, name: str, function: Callable):
        namespace, self.name = name.split("::")
        if namespace not in self.libraries:
            self.libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        self.library = self.libraries[namespace]
        self.signature = inspect.signature(function)
        self.library.define(self.name + _schema(function))
        self.overload = getattr(torch.ops, namespace).__getattr__(self.name).default
        self.library.impl(self.name, self._complete(function), "CompositeExplicitAutograd")

    def _complete(self, function: Callable) -> Callable:
        """The dispatcher leaves out arguments that equal their defaults."""

        def run(*args: Any, **kwargs: Any) -> Any:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*bound.args)

        return run

    def register_fake(self, function: Callable) -> Callable:
        """Say what shapes and dtypes the results have."""
        self.library.impl(self.name, self._complete(function), "Meta")
        return function

    def register_autograd(
        self, backward: Callable, *, setup_context: Callable = lambda *_: None
    ) -> None:
        """Say how gradients are computed."""
        overload = self.overload

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*args)
            setup_context(ctx, args, output)
            return output

        static = dict(forward=staticmethod(forward), backward=staticmethod(backward))
        function: Any = type(self.name, (torch.autograd.Function,), static)
        self.library.impl(self.name, self._complete(function.apply), "Autograd")


def custom_op(name: str) -> Callable[[Callable], Any]:
    """Make a custom operator of a function that changes none of its arguments."""
    if not hasattr(torch.library, "custom_op"):
        return lambda function: CustomOperator(name, function)
    # Given the schema, because not every version reads `Sequence[bool]` and `Tensor | None`.
    make = torch.library.custom_op
    return lambda function: make(name, function, mutates_args=(), schema=_schema(function))
