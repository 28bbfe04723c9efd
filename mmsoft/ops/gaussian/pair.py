"""Both products of the attention operator with its kernel, which is stored if it is small."""

from torch import Tensor

from ..backends import Implementation, Operation
from ..mode import cpu_shortcut
from .eager import BLOCK_ELEMENTS
from .kernel import gaussian_kernel
from .operators import PRODUCT, product_in_units


class Stored:
    """Of a few tokens the kernel need not be computed twice.

    Args:
        q: ``[B, heads, N, d]``.
        landmarks: ``[B, heads, m, d]``, in the dtype of the arithmetic.
        unit: of the values, see :func:`product_in_units`.
    """

    def __init__(self, q: Tensor, landmarks: Tensor, unit: Tensor):
        self.kernel = gaussian_kernel(q.to(landmarks.dtype), landmarks)
        self.unit = unit

    def gather(self, v: Tensor) -> Tensor:
        """``K^T (v / unit)``: ``[B, heads, N, d_v] -> [B, heads, m, d_v]``."""
        return self.kernel.mT @ (v.to(self.kernel.dtype) / self.unit)

    def spread(self, s: Tensor) -> Tensor:
        """``unit * (K s)``: ``[B, heads, m, d_v] -> [B, heads, N, d_v]``, heads inside."""
        return (self.unit * (self.kernel @ s)).transpose(1, 2).contiguous().transpose(1, 2)


class Streamed:
    """As :class:`Stored`, in two operators that compute the kernel block by block."""

    def __init__(self, q: Tensor, landmarks: Tensor, unit: Tensor):
        self.q, self.landmarks, self.unit = q, landmarks, unit

    def gather(self, v: Tensor) -> Tensor:
        """See :meth:`Stored.gather`."""
        return product_in_units(self.landmarks, self.q, v, self.unit, divide=True)

    def spread(self, s: Tensor) -> Tensor:
        """See :meth:`Stored.spread`."""
        return product_in_units(self.q, self.landmarks, s, self.unit, divide=False)


def _not_stored(q: Tensor, landmarks: Tensor, unit: Tensor) -> str | None:
    if not cpu_shortcut(q):
        return "it serves evaluation on a CPU, not traced"
    if q[..., 0].numel() * landmarks.shape[-2] > BLOCK_ELEMENTS["cpu"]:
        return f"the kernel has more than {BLOCK_ELEMENTS['cpu']} elements"
    return PRODUCT.objection()


PAIR = Operation(
    "gaussian_kernel_pair",
    Implementation("stored", Stored, _not_stored),
    Implementation("streamed", Streamed),
)
