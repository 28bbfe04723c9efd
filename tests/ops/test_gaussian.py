"""Streamed products with the Gaussian kernel."""

import weakref

import pytest
import torch
from on_device import device_type
from operators import opcheck

from mmsoft.ops import gaussian_gram, gaussian_kernel, gaussian_kernel_product
from mmsoft.ops.gaussian import eager
from mmsoft.ops.gaussian.operators import BACKWARD, product_in_units
from mmsoft.ops.reference import gaussian_kernel as naive


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks so small that every loop runs several times, the last one short."""
    monkeypatch.setitem(eager.BLOCK_ELEMENTS, device_type(), 500)


@pytest.mark.parametrize(("n", "m"), [(1000, 7), (7, 1000), (63, 63), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("width", [1, 32])
def test_product_and_gradients(n, m, width, tiny_blocks):
    g = torch.Generator().manual_seed(0)
    x, y, w = (
        torch.randn(3, 2, *shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((n, 16), (m, 16), (m, width))
    )
    grad = torch.randn(3, 2, n, width, generator=g, dtype=torch.float64)
    expected = naive(x, y) @ w
    ours = gaussian_kernel_product(x, y, w)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, (x, y, w), grad), torch.autograd.grad(expected, (x, y, w), grad)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e4, 1e19, 3e38])
def test_any_finite_coordinate_gives_a_kernel_in_the_unit_interval(magnitude):
    x = torch.randn(1, 1, 40, 8).sign() * magnitude
    y = torch.cat((x[:, :, :5], -x[:, :, 5:9]), 2)
    for kernel in (
        gaussian_kernel_product(x, y, torch.eye(9).expand(1, 1, 9, 9)),
        gaussian_kernel(x, y),
        gaussian_gram(x),
    ):
        assert ((kernel >= 0) & (kernel <= 1)).all()
    assert (gaussian_gram(x).diagonal(dim1=-2, dim2=-1) == 1).all()
    # Beyond this the squares' rounding reaches the exponent, for us as for plain torch.
    if magnitude <= 1:
        exact = naive(x.double(), y.double())
        torch.testing.assert_close(gaussian_kernel(x, y).double(), exact, rtol=1e-5, atol=1e-6)


def test_kernel_broadcasts():
    x, y = torch.randn(5, 3).double(), torch.randn(2, 1, 4, 3).double()
    tensors = x.requires_grad_(), y.requires_grad_()
    grad = torch.randn(2, 1, 5, 4).double()
    ours, expected = gaussian_kernel(*tensors), naive(*tensors)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(k, tensors, grad) for k in (ours, expected))):
        torch.testing.assert_close(a, b)


def test_translation_does_not_cost_precision():
    """Points far from the origin but near each other, where the expanded square cancels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 50, 16, generator=g) + 1000
    y = torch.randn(1, 1, 6, 16, generator=g) + 1000
    exact = torch.exp(
        -0.5 * (x.double()[..., :, None, :] - y.double()[..., None, :, :]).square().sum(-1)
    )
    eye = torch.eye(6).expand(1, 1, 6, 6)
    torch.testing.assert_close(
        gaussian_kernel_product(x, y, eye).double(), exact, rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(gaussian_kernel(x, y).double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("units", [(), (8.0, True), (0.25, False)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(30, 4), (4, 30)])
def test_custom_operators_pass_opcheck(n, m, units):
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(2, 2, k, 8, generator=g, requires_grad=True) for k in (n, m, m))
    unit, divide = (torch.full((2, 1, 1, 1), units[0]), units[1]) if units else (None, False)
    units = unit, divide
    opcheck(torch.ops.mmsoft.gaussian_kernel_product.default, (x, y, w, *units))
    grad = torch.randn(2, 2, n, 8, generator=g)
    detached = [t.detach() for t in (x, y, w)]
    for needs in ([True] * 3, [False, True, False]):
        arguments = (grad, *detached, *units, needs)
        opcheck(torch.ops.mmsoft.gaussian_kernel_product_backward.default, arguments)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("n", "m"), [(30, 4), (4, 30)])
def test_only_gradients_that_are_asked_for_are_computed(n, m, wanted):
    tensors = [torch.randn(2, 2, k, 8).requires_grad_() for k in (n, m, m)]
    grad = torch.randn(2, 2, n, 8)
    every = torch.autograd.grad(gaussian_kernel_product(*tensors), tensors, grad)
    needs = [i in wanted for i in range(3)]
    with torch.no_grad():
        some = BACKWARD(grad, *tensors, None, False, needs)
    assert [bool(g.numel()) for g in some] == needs
    assert all(torch.equal(some[i], every[i]) for i in wanted)
    for t, need in zip(tensors, needs):
        t.requires_grad_(need)
    leaves = [tensors[i] for i in wanted]
    again = torch.autograd.grad(gaussian_kernel_product(*tensors), leaves, grad)
    assert all(torch.equal(a, every[i]) for a, i in zip(again, wanted))


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize(("n", "m"), [(30, 4), (4, 30)])
def test_units_of_samples_and_the_gradients_that_they_multiply(n, m, divide):
    """A sample's own unit, and which of the gradients it multiplies."""
    tensors = [torch.randn(2, 2, k, 8).requires_grad_() for k in (n, m, m)]
    unit = torch.tensor([8.0, 0.25])[:, None, None, None]
    plain = gaussian_kernel_product(*tensors)
    ours = product_in_units(*tensors, unit, divide=divide)
    torch.testing.assert_close(ours, plain / unit if divide else plain * unit)
    grad = torch.randn_like(plain)
    dx, dy, dw = torch.autograd.grad(plain, tensors, grad)
    # W is in units if w is divided by them; tokens are y then, and x if not.
    expected = (dx / unit, dy, dw) if divide else (dx * unit, dy, dw)
    for a, b in zip(torch.autograd.grad(ours, tensors, grad), expected):
        torch.testing.assert_close(a, b)


def peak_elements(function) -> int:
    """The largest tensor that ``function`` allocates, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_flatten(out)[0]:
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // 4)
            return out

    # Custom operators are opaque to a dispatch mode: call what they are made of.
    with Largest() as mode:
        function()
    return mode.elements


def most_blocks(function, elements: int) -> int:
    """How many tensors of at least so many elements are alive at once within ``function``."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Alive(TorchDispatchMode):
        seen, most = (), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= elements:
                self.seen = [*self.seen, weakref.ref(out)]
            living = [t for ref in self.seen if (t := ref()) is not None]
            self.most = max(self.most, len({t.untyped_storage()._cdata for t in living}))
            return out

    with Alive() as mode:
        function()
    return mode.most


@pytest.mark.cpu  # a tensor of a GPU that is pretended has no memory to be told by
@pytest.mark.parametrize(("n", "m"), [(64, 16), (16, 64)])
def test_one_block_is_alive_and_two_in_the_backward_pass(n, m, monkeypatch):
    """Of several; a second one of the kernel would be left from the block before."""
    monkeypatch.setitem(eager.BLOCK_ELEMENTS, device_type(), 2 * 32 * 16)
    x, y, w, grad = (torch.randn(1, 2, k, 2) for k in (n, m, m, n))
    assert most_blocks(lambda: eager.product(x, y, w), 2 * 32 * 16) == 1
    every = (None, False, (True, True, True))
    assert most_blocks(lambda: eager.product_backward(grad, x, y, w, *every), 2 * 32 * 16) == 2


def test_no_block_exceeds_the_bound(monkeypatch):
    monkeypatch.setitem(eager.BLOCK_ELEMENTS, device_type(), 1 << 19)
    n, m = 20000, 256
    x, y = torch.randn(1, 2, n, 32), torch.randn(1, 2, m, 32)
    stream = eager.Stream(x, y, torch.float32)
    assert max(k.numel() for *_, k in stream) <= eager.BLOCK_ELEMENTS[device_type()] < 2 * n * m
    assert sum(k.shape[2] for *_, k in stream) == n
    assert peak_elements(lambda: [None for _ in stream]) < n * m
