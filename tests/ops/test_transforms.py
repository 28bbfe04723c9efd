"""Forward mode and ``torch.func``: the values and derivatives of the definitions, never zeros."""

import pytest
import torch
from operators import JVPS, VARIANTS, needs_torch_2_6, needs_torch_2_9
from torch import Tensor
from torch.autograd import forward_ad

from mmsoft.ops import (
    gaussian_kernel_product,
    landmark_patches,
    newton_raphson_pinv,
    softmax_free_attention,
    step_size,
    tikhonov_pinv_product,
)
from mmsoft.ops.inverse.operators import tikhonov_solve
from mmsoft.ops.reference import gaussian_kernel as naive
from mmsoft.ops.reference import softmax_free_attention as reference

# vmap says so of every operation that it has no rule for.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def normal(*shape) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def arguments(n=11, m=5) -> tuple[Tensor, Tensor, Tensor]:
    return 0.5 * normal(2, 2, n, 8), normal(2, 2, n, 8), 0.5 * normal(2, 2, m, 8)


def true_gradients(arguments, cotangent, **kwargs) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in arguments]
    return torch.autograd.grad(reference(*leaves, **kwargs), leaves, cotangent)


def close(ours, truth) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11 * float(truth.abs().max()))


@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_tangents_match_the_gradients_of_the_definition(normalize, solver, jvp):
    """``<J t, w> = <t, J^T w>``, the right-hand side from the float64 definition."""
    kwargs = dict(normalize=normalize, solver=solver, scale=0.7)
    primals, tangents = arguments(), arguments()
    expected = reference(*primals, **kwargs)
    cotangent = torch.randn_like(expected)
    gradients = true_gradients(primals, cotangent, **kwargs)
    products = [(g * t).sum() for g, t in zip(gradients, tangents)]

    def function(*args):
        return softmax_free_attention(*args, **kwargs)

    out, tangent = jvp(function, primals, tangents)
    close(out, expected)
    close((tangent * cotangent).sum(), sum(products))
    for i, product in enumerate(products):  # one of the arguments alone

        def of_one(x, i=i):
            return function(*primals[:i], x, *primals[i + 1 :])

        close((jvp(of_one, primals[i : i + 1], tangents[i : i + 1])[1] * cotangent).sum(), product)


def test_finite_differences_of_every_operator():
    """In forward mode, in reverse mode over a batch of cotangents, and forward over reverse."""
    batched = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    for n, m in ((4, 2), (2, 4)):
        tensors = [normal(1, 2, k, 3).requires_grad_() for k in (n, m, m)]
        assert torch.autograd.gradcheck(gaussian_kernel_product, tensors, **batched)

    def patches(q):
        return landmark_patches(q, (3, 7), 2, 2, 2)

    q = normal(1, 21, 4).requires_grad_()
    assert torch.autograd.gradcheck(patches, q, **batched)
    assert torch.autograd.gradgradcheck(patches, q, check_fwd_over_rev=True)

    points, b = normal(1, 2, 3, 3), normal(1, 2, 3, 2).requires_grad_()
    a = naive(points, points).requires_grad_()
    mu = torch.full((1, 2, 1, 1), 0.03, dtype=torch.float64)

    def solve(a, b):  # with a mu that does not follow a
        a = (a + a.mT) / 2
        return tikhonov_solve(a, mu, a @ b)

    kwargs = dict(check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(solve, (a, b), **kwargs)
    assert torch.autograd.gradgradcheck(solve, (a, b), check_fwd_over_rev=True)

    def inverse(a):
        a = (a + a.mT) / 2
        return newton_raphson_pinv(a, *step_size(a, guarded=True), 40)

    assert torch.autograd.gradcheck(inverse, a, **kwargs)
    assert torch.autograd.gradgradcheck(inverse, a, check_fwd_over_rev=True)


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_reverse_mode_of_torch_func(normalize, solver):
    kwargs = dict(normalize=normalize, solver=solver)
    primals = arguments()
    cotangent = torch.randn_like(primals[1])
    gradients = true_gradients(primals, cotangent, **kwargs)

    def function(*args):
        return softmax_free_attention(*args, **kwargs)

    def loss(*args):
        return (function(*args) * cotangent).sum()

    for ours, truth in zip(torch.func.grad(loss, (0, 1, 2))(*primals), gradients):
        close(ours, truth)
    for ours, truth in zip(torch.func.vjp(function, *primals)[1](cotangent), gradients):
        close(ours, truth)
    # A batch of cotangents for a graph that was recorded without any transform.
    leaves = [t.clone().requires_grad_() for t in primals]
    cotangents = torch.stack((cotangent, 3 * cotangent))
    batch = torch.autograd.grad(function(*leaves), leaves, cotangents, is_grads_batched=True)
    for ours, truth in zip(batch, gradients):
        close(ours, torch.stack((truth, 3 * truth)))


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_vmap_over_each_argument_and_over_all(normalize, solver):
    """Over each argument and over all, and gradients sample by sample."""
    q, v, landmarks = arguments()

    def function(*args):
        return softmax_free_attention(*args, normalize=normalize, solver=solver)

    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        several = [
            t if dim is None else torch.stack((t, 1.5 * t))
            for t, dim in zip((q, v, landmarks), dims)
        ]
        second = [1.5 * t if dim == 0 else t for t, dim in zip((q, v, landmarks), dims)]
        ours = torch.vmap(function, dims)(*several)
        close(ours, torch.stack((function(q, v, landmarks), function(*second))))

    def loss(*sample):
        return function(*(t[None] for t in sample)).square().sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(q, v, landmarks)
    out = reference(q, v, landmarks, normalize=normalize, solver=solver)
    truth = true_gradients((q, v, landmarks), 2 * out, normalize=normalize, solver=solver)
    for ours, expected in zip(gradients, truth):
        close(ours, expected)


@pytest.mark.parametrize(("normalize", "solver"), VARIANTS)
def test_second_derivatives_in_every_mode(normalize, solver):
    """Of queries against finite differences of the definition, of all arguments mode by mode."""
    primals = [t[:1, :1] for t in arguments(3, 2)]

    def loss(*args):
        return softmax_free_attention(*args, normalize=normalize, solver=solver).square().sum()

    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd
    for i in range(3):
        truth = jacrev(jacrev(loss, i), i)(*primals)
        for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
            close(outer(inner(loss, i), i)(*primals), truth)
        if i == 0:
            step = 1e-5 * torch.randn_like(primals[0])
            sides = []
            for q in (primals[0] + step, primals[0] - step):
                args = (q, *primals[1:])
                out = reference(*args, normalize=normalize, solver=solver)
                cotangent = 2 * out
                sides.append(true_gradients(args, cotangent, normalize=normalize, solver=solver)[0])
            expected = (sides[0] - sides[1]) / 2
            ours = torch.einsum("abijabkl,abkl->abij", truth, step)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * expected.abs().max())


# The compiler of torch 2.6 refuses the backward pass of an autograd.Function under grad.
@needs_torch_2_6
@pytest.mark.parametrize(
    "transform", ["jvp", "vmap", "hvp", pytest.param("grad", marks=needs_torch_2_9)]
)
def test_compiled_transforms(transform):
    """A compiler traces what eager mode does under a transform, without a break."""
    primals, tangents = arguments(), arguments()

    def function(*args):
        return softmax_free_attention(*args, solver="direct")

    gradient = torch.func.grad(lambda *args: function(*args).square().sum(), (0, 1, 2))
    transformed = {
        "jvp": lambda *args: torch.func.jvp(function, args, tangents),
        "grad": gradient,
        "vmap": lambda *args: torch.vmap(function)(*(torch.stack((t, 2 * t)) for t in args)),
        "hvp": lambda *args: torch.func.jvp(gradient, args, tangents),
    }[transform]
    torch._dynamo.reset()
    compiled = torch.compile(transformed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*primals), transformed(*primals))


def test_tangents_of_a_backward_pass_that_was_recorded_without_them():
    """Right where the operator is linear, and refused where the kernel is streamed."""
    q = normal(2, 35, 4).requires_grad_()
    a, b = naive(*(normal(1, 2, 4, 3),) * 2), normal(1, 2, 4, 2).requires_grad_()
    for out, leaf in ((landmark_patches(q, (5, 7), 2, 2, 4), q), (tikhonov_pinv_product(a, b), b)):
        w, tangent = torch.randn_like(out), torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, leaf, tangent, retain_graph=True)
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(w, tangent))
            close(forward_ad.unpack_dual(grad).tangent, expected)
    leaves = [t.requires_grad_() for t in arguments()]
    out = softmax_free_attention(*leaves)
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(
            NotImplementedError, match="compute the forward pass under forward mode"
        ):
            torch.autograd.grad(out, leaves, w)
