"""Whether a module is what its class says, so that its weights may be used without calling it."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_OF_ALL = tuple(getattr(torch_module, f"_global_{hooks}") for hooks in _HOOKS)


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook waits for a call of ``module``, forward or backward."""
    return any(_OF_ALL) or any(getattr(module, f"_{hooks}") for hooks in _HOOKS)


def is_plain(module: nn.Module, *forwards: Callable) -> bool:
    """Whether a call of ``module`` is one of these functions and nothing else.

    False with hooks, or where an adapter or a quantized layer has taken its place.
    """
    replaced = "forward" in vars(module) or type(module).forward not in forwards
    return not replaced and not is_hooked(module)
