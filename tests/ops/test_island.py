"""The float32 island: no autocast in either pass; devices without data."""

import pytest
import torch
from on_device import device_type
from operators import VARIANTS, before_torch, needs_torch_2_6
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from mmsoft.ops import (
    gaussian_kernel,
    landmark_patches,
    newton_raphson_pinv,
    softmax_free_attention,
    step_size,
    tikhonov_pinv_product,
)


def autocast(enabled: bool):
    return torch.autocast(device_type(), torch.bfloat16, enabled=enabled)


def arguments(**kwargs) -> list[Tensor]:
    return [torch.randn(2, 2, n, 16, **kwargs).requires_grad_() for n in (60, 60, 9)]


@pytest.mark.parametrize("forward_inside", [False, True])
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_backward_inside_autocast(normalize, solver, forward_inside):
    """To the last bit the gradients of a backward pass outside, wherever the forward pass ran."""
    tensors = arguments()
    kwargs = dict(normalize=normalize, solver=solver)
    cotangent = torch.randn_like(tensors[0])
    expected = torch.autograd.grad(softmax_free_attention(*tensors, **kwargs), tensors, cotangent)
    with autocast(forward_inside):
        out = softmax_free_attention(*tensors, **kwargs)
    with autocast(True):
        ours = torch.autograd.grad(out, tensors, cotangent)
        of_func = torch.func.vjp(lambda *t: softmax_free_attention(*t, **kwargs), *tensors)[1]
        for a, b, c in zip(ours, expected, of_func(cotangent)):
            assert torch.equal(a, b)
            torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@needs_torch_2_6
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_compiled_backward_inside_autocast(solver):
    """Both passes of a training step with automatic mixed precision."""
    tensors = arguments()

    def function(*args):
        return softmax_free_attention(*args, solver=solver)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn_like(tensors[0])
    expected = torch.autograd.grad(function(*tensors), tensors, cotangent)
    for inside in (False, True):
        with autocast(True):
            out = compiled(*tensors)
        with autocast(inside):
            for a, b in zip(torch.autograd.grad(out, tensors, cotangent), expected):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_second_derivatives_inside_autocast():
    points = torch.randn(2, 2, 9, 16)
    a = gaussian_kernel(points, points).requires_grad_()
    b = torch.randn(2, 2, 9, 5, requires_grad=True)
    q = torch.randn(2, 48, 32, requires_grad=True)
    calls = {
        "newton": (lambda a: newton_raphson_pinv(a, *step_size(a, guarded=True)), (a,)),
        "direct": (tikhonov_pinv_product, (a, b)),
        "kernel": (lambda x: gaussian_kernel(x, points), (points.clone().requires_grad_(),)),
        "patches": (lambda q: landmark_patches(q, (6, 8), 2, 2, 5).square(), (q,)),
    }
    for name, (function, leaves) in calls.items():
        results = []
        for inside in (False, True):
            with autocast(inside):
                first = torch.autograd.grad(
                    function(*leaves).square().sum(), leaves, create_graph=True
                )
                second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            results.append([*first, *second])
        for outside, inside in zip(*results):
            assert torch.equal(outside, inside), name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_tensors_without_data(normalize, solver, kind, grad):
    """Shape, dtype and memory of the result and the gradients, under autocast as well."""
    real = [t.requires_grad_(grad) for t in arguments(dtype=torch.bfloat16)]
    real[2] = real[2].detach().float().requires_grad_(grad)
    fake = FakeTensorMode()

    def outputs(tensors):
        with torch.set_grad_enabled(grad), autocast(True):
            out = softmax_free_attention(*tensors, normalize=normalize, solver=solver)
        return [out, *(torch.autograd.grad(out.sum(), tensors) if grad else ())]

    if kind == "meta":
        results = outputs([t.detach().to("meta").requires_grad_(grad) for t in real])
    else:
        with fake:
            results = outputs([fake.from_tensor(t) for t in real])
    for ours, expected in zip(results, outputs(real)):
        assert isinstance(ours, FakeTensor) or ours.is_meta
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_memory_that_nobody_writes_is_poisoned_here(dtype):
    x = torch.zeros(7, 5, dtype=dtype)

    def fresh(x):
        strided = x.new_empty_strided((7, 5), (1, 7)), torch.empty_strided((7, 5), (5, 1)).to(dtype)
        return x.new_empty(7, 5), torch.empty_like(x), torch.empty(7, 5, dtype=dtype), *strided

    for function in (fresh, torch.compile(fresh, backend="aot_eager")):
        assert all(t.isnan().all() for t in function(x))


TF32 = """
import os
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from mmsoft.ops import island
from mmsoft.ops.gaussian import eager as gaussian
from mmsoft.ops.inverse import eager as inverse
from mmsoft.ops.landmarks import choice

island.TF32_DEVICES.add("cpu")
products = torch.backends.cuda.matmul
has_new_name = "fp32_precision" in sys.argv

def allowed():
    return products.fp32_precision == "tf32" if has_new_name else products.allow_tf32

def answer(getter):
    try:
        return getter()
    except RuntimeError:
        return "raises"

def names():  # under which it is asked for, and what they say of a CPU
    found = [answer(lambda: products.allow_tf32), answer(torch.get_float32_matmul_precision)]
    return found + [torch.backends.mkldnn.matmul.fp32_precision] * has_new_name

class Products(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            found.add(allowed())
            older.add(answer(lambda: products.allow_tf32))
        return function(*args, **(kwargs or {}))

def check():
    global found, older
    before, known = allowed(), names()
    x, y, b = (torch.randn(2, 2, n, 8) for n in (20, 5, 5))
    a, unit = torch.eye(5).expand(2, 2, 5, 5), torch.ones(2, 2, 1, 1)
    for call in (
        lambda: a @ b,
        lambda: island._multiply(a, b),
        lambda: gaussian.product(x, y, b),
        lambda: gaussian.product_backward(x, x, y, b, None, False, (True, True, True)),
        lambda: inverse.step_size(a),
        lambda: inverse.newton(a, unit, unit, 3),
        lambda: inverse.solve(a, unit, b),
        lambda: choice.choose(x, 4, 1e-2),
    ):
        found, older = set(), set()
        with Products():
            call()
        print(*found, *older)
    print(before, allowed(), "as before" if names() == known else (known, names()))
    try:
        with island.no_autocast(x):
            raise ValueError
    except ValueError:
        assert names() == known

def everything():
    torch.backends.fp32_precision = "tf32"
    check()
    torch.backends.fp32_precision = "ieee"
    print(allowed())  # it still decides

def of_products():
    products.fp32_precision = "tf32"
    check()

def of_older_name():
    products.allow_tf32 = True
    check()

def high():
    torch.set_float32_matmul_precision("high")
    check()

def medium():
    torch.set_float32_matmul_precision("medium")
    check()

def medium_on_gpus():
    medium()
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    check()

new = [medium_on_gpus, everything, of_products] if has_new_name else []
for setting in [check, of_older_name, high, medium, *new]:
    print(setting.__name__)
    sys.stdout.flush()
    if not os.fork():
        setting()
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_no_product_of_the_island_is_in_tf32(run_outside):
    """As on a GPU, where it may be allowed under three names; and so it is again afterwards."""
    new_name = [] if before_torch("2.9") else ["fp32_precision"]
    done = run_outside("-W", "ignore", "-c", TF32, *new_name)
    assert done.returncode == 0, done.stderr[-2000:]
    inside, last = 7 * ["False False"], "True True as before"  # both names
    expected = ["check", "False False", *inside, "False False as before"]
    for setting in ("of_older_name", "high", "medium"):
        expected += [setting, "True True", *inside, last]
    if new_name:
        expected += ["medium_on_gpus", *(2 * ["True True", *inside, last])]
        expected += ["everything", "True raises", *inside, last, "False"]
        expected += ["of_products", "True raises", *inside, last]
    assert done.stdout.splitlines() == expected
