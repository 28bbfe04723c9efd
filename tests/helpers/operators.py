"""What tests of operators and of their derivatives share."""

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

# normalize, solver
VARIANTS = [(True, "newton"), (False, "newton"), (True, "direct"), (False, "direct")]


def before_torch(version):
    """Whether torch is older."""
    return Version(torch.__version__) < Version(version)


needs_torch_2_6 = pytest.mark.skipif(
    before_torch("2.6"), reason="one graph, or torch.export, needs torch >= 2.6"
)
# Products of it, in plain torch too.
FLOAT16 = pytest.param(
    torch.float16,
    marks=pytest.mark.skipif(before_torch("2.3"), reason="float16 on a CPU needs torch >= 2.3"),
)
needs_torch_2_9 = pytest.mark.skipif(before_torch("2.9"), reason="needs torch >= 2.9")


def opcheck(*args, **kwargs):
    """``torch.library.opcheck``, or skip the rest of the test."""
    if not hasattr(torch.library, "opcheck"):
        pytest.skip("opcheck needs torch >= 2.4")
    return torch.library.opcheck(*args, **kwargs)


class Calls(TorchDispatchMode):
    """The names of the operations that run, without namespace and overload."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def jvp_of_duals(function, primals, tangents):
    """As ``torch.func.jvp``: value and tangent, of each result if there are several."""
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, primals, tangents))
        if isinstance(out, Tensor):
            return forward_ad.unpack_dual(out)
        return tuple(zip(*map(forward_ad.unpack_dual, out)))


def jvp_without_grad(function, primals, tangents):
    with torch.no_grad():
        return jvp_of_duals(function, primals, tangents)


JVPS = [torch.func.jvp, jvp_of_duals, jvp_without_grad]
