"""The two inverses against their spectral definitions."""

import pytest
import torch
from metrics import error
from operators import opcheck

from mmsoft.ops import (
    gaussian_kernel,
    newton_raphson_pinv,
    reference,
    step_size,
    tikhonov_pinv_product,
)
from mmsoft.ops.inverse import guarded_newton_pinv


def gram(m: int, condition: float, batch=(2, 2), seed=0) -> torch.Tensor:
    """Gram matrices of a Gaussian kernel with about the given condition number, float64."""
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(*batch, m, 8, generator=g, dtype=torch.float64)
    low, high = 1e-6, 30.0
    for _ in range(14):  # the further apart the points, the better conditioned
        spread = (low * high) ** 0.5
        worst = torch.linalg.cond(gaussian_kernel(points * spread, points * spread)).max()
        low, high = (low, spread) if worst < condition else (spread, high)
    return gaussian_kernel(points * high, points * high)


def released(a: torch.Tensor, guarded: bool) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Step size and number of steps by the reference."""
    if guarded:
        alpha, extra = reference.step_size_softplusplus(a)
        return alpha, 20 + extra
    return reference.step_size_soft(a), 20


@pytest.mark.parametrize("condition", [1.5, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("m", [1, 2, 49, 130])
@pytest.mark.parametrize("guarded", [True, False])
def test_newton_is_the_spectral_filter(m, condition, guarded):
    a = gram(m, condition)
    expected = reference.newton_filter(a, *released(a, guarded))
    tolerance = dict(rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    torch.testing.assert_close(
        newton_raphson_pinv(a, *step_size(a, guarded)), expected, **tolerance
    )
    torch.testing.assert_close(
        reference.newton_raphson(a, *released(a, guarded)), expected, **tolerance
    )


def test_the_guarded_start_is_part_of_the_operator():
    a = gram(7, 1e3, (3, 2)).requires_grad_()
    both = guarded_newton_pinv(a, 9), newton_raphson_pinv(a, *step_size(a, guarded=True), 9)
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad(out.sum(), a)[0] for out in both))


def test_guard_halves_by_what_the_loop_would():
    """From no halving (the identity) to many (strongly overlapping landmarks)."""
    halvings = set()
    for spread in (10.0, 1.5, 1.0, 0.5, 0.1):
        points = torch.randn(3, 2, 64, 8, dtype=torch.float64) * spread
        a = gaussian_kernel(points, points)
        alpha, cubic = step_size(a, guarded=True)
        expected, extra = reference.step_size_softplusplus(a)
        torch.testing.assert_close(alpha, expected * 2**extra)
        torch.testing.assert_close(cubic, alpha**2 / 4 * extra)
        start = 2 / a.sum(-1).amax((1, 2)) ** 2
        halvings |= {round(h) for h in torch.log2(start / alpha.flatten()).tolist()}
    assert 0 in halvings
    assert max(halvings) == 8  # what a matrix of ones needs, the most there is


def test_one_landmark_and_far_landmarks_are_inverted():
    """The released start makes alpha l^2 = 2 for an eigenvalue l, and 20 steps lead to 0."""
    for a in (torch.ones(1, 1, 1, 1), torch.eye(6)[None, None], torch.ones(1, 1, 2, 2)):
        a = a.double()
        alpha, cubic = step_size(a, guarded=True)
        assert newton_raphson_pinv(a, alpha, torch.zeros_like(cubic)).abs().max() < 1e-9
        torch.testing.assert_close(newton_raphson_pinv(a, alpha, cubic), torch.linalg.pinv(a))


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_the_corrected_start_keeps_the_released_filter(gap):
    a = torch.tensor([[1.0, 1 - gap, 0], [1 - gap, 1, 0.002], [0, 0.002, 1]]).double()[None, None]
    alpha, cubic = step_size(a, guarded=True)
    assert float(cubic) > 0  # accepted at once
    as_released = newton_raphson_pinv(a, alpha, torch.zeros_like(cubic))
    torch.testing.assert_close(
        newton_raphson_pinv(a, alpha, cubic), as_released, rtol=1e-6, atol=1e-6
    )


def test_twenty_steps_are_needed_where_the_guard_accepts_at_once():
    """Two near-duplicates pass the guard unhalved, and lose the filter with a step fewer."""
    a = torch.tensor([[1.0, 1 - 1e-3], [1 - 1e-3, 1.0]], dtype=torch.float64)[None, None]
    start = step_size(a, guarded=True)
    full, fewer = (newton_raphson_pinv(a, *start, steps) for steps in (20, 19))
    assert error(fewer, full) > 1e-2


@pytest.mark.parametrize("m", [1, 5, 49])
def test_direct_solve(m):
    a, b = gram(m, 1e5), torch.randn(2, 2, m, 3, dtype=torch.float64)
    expected = reference.tikhonov_filter(a) @ b
    torch.testing.assert_close(tikhonov_pinv_product(a, b), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("m", [1, 49, 1050])
def test_direct_solve_is_stable_at_any_conditioning(m):
    """A constant image: A is all ones, of rank 1. Float32 against float64."""
    ones, b = torch.ones(1, 1, m, m), torch.randn(1, 1, m, 4)
    exact = (b.double().mean(2, keepdim=True) / m / (1 + 1e-4)).expand(1, 1, m, 4)
    assert (tikhonov_pinv_product(ones, b) - exact).norm() < 5e-3 * exact.norm()
    for spread in (1e-3, 1e-2, 0.1, 1.0):
        points = torch.randn(1, 1, m, 32) * spread
        a = gaussian_kernel(points, points)
        solution = tikhonov_pinv_product(a, a @ b)
        assert solution.norm() <= 1.01 * b.norm()  # g(x) x <= 1
        a, b64 = a.double(), b.double()
        mu = 0.01 * a.sum(-1).max()
        exact = torch.linalg.solve(a @ a + mu**2 * torch.eye(m).double(), a @ (a @ b64))
        assert (solution - exact).norm() < 0.02 * exact.norm()


def test_a_factorization_that_fails_is_noticed():
    """Of an argument that is no Gram matrix; the others of its batch are solved."""
    a = torch.eye(4).repeat(2, 1, 1, 1)
    mu, b = torch.full((2, 1, 1, 1), 1e-3), torch.ones(2, 1, 4, 3)
    a[0, 0] = torch.block_diag(*2 * [torch.tensor([[0, 1.0], [-1, 0]])])  # A^2 is -I
    out = torch.ops.mmsoft.tikhonov_solve(a, mu, b)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_distance_between_the_solvers():
    """Close where A is well conditioned, or nearly of rank 1; some per cent apart in between."""
    bounds = ((2, 0, 4e-4), (1e2, 5e-3, 0.03), (1e4, 3e-3, 0.015), (1e8, 0, 5e-4))
    for condition, low, high in bounds:
        a = gram(49, condition)
        newton = newton_raphson_pinv(a, *step_size(a, guarded=True))
        direct = reference.tikhonov_filter(a)
        assert low < float((a @ (newton - direct) @ a).norm() / a.norm()) < high


def test_custom_operators_pass_opcheck():
    a = gram(6, 50).float().requires_grad_()
    opcheck(torch.ops.mmsoft.newton_raphson_pinv.default, (a, *step_size(a, True), 20))
    opcheck(torch.ops.mmsoft.newton_raphson_pinv.default, (a, None, None, 20))
    b = torch.randn(2, 2, 6, 3, requires_grad=True)
    opcheck(torch.ops.mmsoft.tikhonov_solve.default, (a, torch.full((2, 2, 1, 1), 0.05), b))
    grad = torch.randn(2, 2, 6, 6, requires_grad=True)
    opcheck(torch.ops.mmsoft.newton_raphson_pinv_backward.default, (a.mT, grad))
    y = torch.randn(2, 2, 6, 3).transpose(0, 1).requires_grad_()
    opcheck(torch.ops.mmsoft.tikhonov_solve_backward.default, (a, b, y))


def test_backward_passes_are_operators_with_derivatives_of_their_own():
    """Of any arguments, symmetric or not."""
    a, grad = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    x, y = torch.randn(2, 1, 2, 4, 3, dtype=torch.float64).requires_grad_()
    newton = torch.ops.mmsoft.newton_raphson_pinv_backward
    solve = torch.ops.mmsoft.tikhonov_solve_backward
    torch.testing.assert_close(newton(a, grad), -a.mT @ grad @ a.mT)
    torch.testing.assert_close(solve(a, x, y), -(y @ x.mT @ a.mT + a @ y @ x.mT))
    assert torch.autograd.gradcheck(newton, (a, grad))
    assert torch.autograd.gradgradcheck(newton, (a, grad))
    assert torch.autograd.gradcheck(solve, (a, x, y))
