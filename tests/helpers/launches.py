"""Counts what a program would ask a GPU to launch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATE_ALONE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")


class Launches(TorchDispatchMode):
    """The operations that run, without views and what only allocates.

    On the meta device, which takes what a GPU takes; a custom operator and, in the forward pass,
    fused attention are one each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.within_one = 0, False
        self.functions = _Functions(self)

    def __enter__(self) -> "Launches":
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (self.within_one or func.is_view or name in ALLOCATE_ALONE):
            self.count += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, launches: Launches):
        self.launches = launches

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.launches.count += 1
        self.launches.within_one = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.launches.within_one = False


def launches(model: torch.nn.Module, images: torch.Tensor) -> tuple[int, int, int]:
    """Of a forward pass in evaluation, of one in training and of its backward pass.

    Both are on the meta device.
    """
    with torch.no_grad(), Launches() as evaluation:
        model.eval()(images)
    with Launches() as training:
        outs = model.train()(images)
    with Launches() as backward:
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    return evaluation.count, training.count, backward.count
