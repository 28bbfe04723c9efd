"""Custom operators as torch before 2.4 registers them, on any torch."""

import pytest
import torch
from operators import opcheck
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmsoft.ops import library
from mmsoft.ops.library import CustomOperator, autocast_enabled


def weigh(x: Tensor, other: Tensor | None = None, factor: float = 2.0, power: int = 1) -> Tensor:
    assert not torch.is_grad_enabled() or not x.requires_grad  # below autograd
    return factor * x**power if other is None else factor * x**power + other


WEIGH = CustomOperator("mmsoft_tests::weigh", weigh)
CALLS = []


@WEIGH.register_fake
def _(x: Tensor, other: Tensor | None = None, factor: float = 2.0, power: int = 1) -> Tensor:
    return torch.empty_like(x)


def context(ctx, inputs, output):
    x, _, ctx.factor, ctx.power = inputs  # all four, defaults too
    ctx.save_for_backward(x)


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    CALLS.append(ctx.needs_input_grad)
    slope = ctx.factor * ctx.power * x ** (ctx.power - 1)
    return grad * slope, grad if ctx.needs_input_grad[1] else None, None, None


WEIGH.register_autograd(backward, setup_context=context)


@pytest.mark.parametrize("arguments", [(), (1.5, 3)], ids=str)
@pytest.mark.parametrize("with_other", [False, True])
def test_values_and_gradients(with_other, arguments):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_other else None
    operator = torch.ops.mmsoft_tests.weigh
    out = operator(x, other, *arguments)
    factor, power = arguments or (2.0, 1)
    torch.testing.assert_close(out, factor * x**power + (0 if other is None else other))
    CALLS.clear()
    inputs = [t for t in (x, other) if t is not None]
    found = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(found[0], factor * power * x ** (power - 1))
    assert len(found) == len(inputs)
    assert len(CALLS) == 1
    assert not operator(x.detach()).requires_grad
    with torch.no_grad():
        assert not operator(x).requires_grad
    assert torch.autograd.gradcheck(lambda x: operator(x, other, *arguments), (x,))


def test_tensors_without_data():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3, 4)).requires_grad_()
        out = torch.ops.mmsoft_tests.weigh(x)
        out.sum().backward()
        assert (out.shape, x.grad.shape) == ((3, 4), (3, 4))
    assert torch.ops.mmsoft_tests.weigh(torch.ones(2, device="meta")).is_meta


def test_newer_torch_finds_it_in_order():
    opcheck(torch.ops.mmsoft_tests.weigh, (torch.randn(3, requires_grad=True),))


def test_autocast_enabled():
    assert not autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_enabled("cpu")
        assert not autocast_enabled("cuda")


def test_torch_is_given_the_schema(monkeypatch):
    """It would infer it, but up to 2.6 cannot for every operator of ours."""
    given = {}
    monkeypatch.setattr(
        torch.library, "custom_op", lambda *_, **options: given.update(options), raising=False
    )
    library.custom_op("mmsoft_tests::weigh_again")(weigh)
    tensors = "Tensor x, Tensor? other=None"
    assert given["schema"] == f"({tensors}, float factor=2.0, SymInt power=1) -> (Tensor)"
