"""Which tokens are padding, and what layers make of that: once for all of them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .island import compute_dtype, matmul, recorded_matmul
from .mode import may_set, recorded


def once(method: Callable) -> Callable:
    """A method of :class:`TokenMask` whose result stays with the object, for each argument.

    A compiler finds by itself what is computed twice, and can record no change of an object that
    a layer with ``with_cp`` was handed.
    """

    @wraps(method)
    def kept(self: "TokenMask", *args: Any) -> Any:
        if not may_set():
            return method(self, *args)
        key = (method.__name__, *args)
        if key not in self._made:
            self._made[key] = method(self, *args)
        return self._made[key]

    return kept


class TokenMask:
    """Which tokens of a batch are not padding; it lives for one forward pass.

    Args:
        tokens: ``[B, N]``, bool, at least one of each sample; see :func:`all_if_none`.
    """

    def __init__(self, tokens: Tensor):
        self._tokens = tokens
        self._made: dict[Any, Any] = {}

    def tokens(self) -> Tensor:
        """``[B, N]``, bool."""
        return self._tokens

    @once
    def padding(self) -> Tensor:
        """The other ones, ``[B, N]``."""
        return ~self.tokens()

    @once
    def numbers(self, dtype: torch.dtype) -> Tensor:
        """1 for a token and 0 for padding, ``[B, N]``."""
        return self.tokens().to(dtype)

    @once
    def count(self) -> Tensor:
        """Tokens of each sample, ``[B]``."""
        return self.tokens().sum(1)

    @once
    def shares(self, dtype: torch.dtype) -> Tensor:
        """What tokens count in a mean over them, ``[B, N]``."""
        return self.numbers(dtype) / self.count()[:, None]

    @once
    def bias(self, dtype: torch.dtype, before: int = 0) -> Tensor:
        """What takes padding from a softmax over the tokens, ``[B, 1, 1, before + N]``.

        So many that are always there come before them.
        """
        there = self.numbers(dtype)
        if before:
            there = F.pad(there, (before, 0), value=1.0)
        return there.log()[:, None, None]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the tokens of ``x [B, N, C]``, which is finite in padding: ``[B, 1, C]``.

        In float32, float64 for float64; in one pass over memory.
        """
        x = x.to(compute_dtype(x))
        shares = self.shares(x.dtype)[:, None]
        return (recorded_matmul if recorded(x) else matmul)(shares, x)


def all_if_none(there: Tensor) -> Tensor:
    """``there [..., n]``, True for all of a row without any: a softmax is over something."""
    return there == there.any(-1, keepdim=True)
