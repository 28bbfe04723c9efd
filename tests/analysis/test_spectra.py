"""Convergence, spectrum, filter and regions against their definitions."""

import pytest
import torch

from mmsoft.analysis import inverse_filter, landmark_regions, newton_residuals, spectrum
from mmsoft.ops import (
    gaussian_gram,
    gaussian_kernel,
    newton_raphson_pinv,
    reference,
    step_size,
    tikhonov_pinv_product,
)
from mmsoft.ops.inverse import RIDGE_SOFT


@pytest.fixture
def landmarks():
    return torch.randn(2, 3, 20, 8, dtype=torch.float64) * 0.35


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("norm", ["2", "fro"])
def test_residuals_are_those_of_the_iterates(landmarks, normalize, norm):
    residuals = newton_residuals(landmarks, normalize=normalize, steps=9, norm=norm)
    assert residuals.shape == (10, 2, 3)
    a = gaussian_gram(landmarks)
    alpha, cubic = step_size(a, guarded=normalize)
    if not normalize:
        a = a + RIDGE_SOFT * torch.eye(20, dtype=a.dtype)
    p = 2 if norm == "2" else "fro"
    for k in (0, 4, 9):
        x = newton_raphson_pinv(a, alpha, cubic, k)
        error = torch.linalg.matrix_norm(a @ x @ a - a, ord=p)
        expected = error / torch.linalg.matrix_norm(a, ord=2)
        torch.testing.assert_close(residuals[k], expected, rtol=1e-8, atol=1e-14)
    assert (residuals.diff(dim=0) <= 1e-12).all()  # every step makes it smaller


def test_released_rule_takes_its_maximum_over_the_batch(landmarks):
    landmarks = torch.cat((landmarks, landmarks * 0.3))  # the latter overlap much more
    ours = newton_residuals(landmarks)
    released = newton_residuals(landmarks, rule="released")
    alone = torch.cat([newton_residuals(sample[None], rule="released") for sample in landmarks], 1)
    assert (alone[-1] <= released[-1] + 1e-9).all()
    assert (alone[5, :2] < released[5, :2]).all()  # slowed down by the others
    # A sample by itself: the same, where the guard halved.
    torch.testing.assert_close(alone, ours)
    a = gaussian_gram(landmarks).flatten(0, 1)[None]
    alpha, extra = reference.step_size_softplusplus(a)
    x = reference.newton_raphson(a, alpha * 2**extra, 20)
    error = torch.linalg.matrix_norm(a @ x @ a - a, ord=2) / torch.linalg.matrix_norm(a, ord=2)
    torch.testing.assert_close(released[-1].flatten(), error[0], rtol=1e-6, atol=1e-12)


def test_only_the_released_start_fails_on_far_landmarks():
    landmarks = torch.randn(1, 1, 6, 8) * 100
    assert newton_residuals(landmarks)[-1].item() < 1e-6
    assert newton_residuals(landmarks, rule="released")[-1].item() > 0.9


def test_residuals_run_in_the_dtype_of_the_model(landmarks):
    """In float32 the residual ends at rounding, not where float64 would take it."""
    points = landmarks * 6  # well conditioned
    single, double = newton_residuals(points.float()), newton_residuals(points)
    torch.testing.assert_close(single[:8], double[:8], rtol=1e-3, atol=1e-5)
    assert double[-1].max() < 1e-10 < single[-1].min()


def test_nan_landmarks_give_an_infinite_residual():
    landmarks = torch.randn(1, 2, 5, 4)
    landmarks[0, 1, 0, 0] = torch.nan
    residuals = newton_residuals(landmarks, normalize=False)
    assert residuals[:, 0, 0].isfinite().all()
    assert not residuals[-1, 0, 1].isfinite()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_filter_reproduces_the_inverse(landmarks, normalize, solver):
    a = gaussian_gram(landmarks)
    values, vectors = torch.linalg.eigh(a)
    torch.testing.assert_close(spectrum(landmarks), values)
    if solver == "direct":
        pinv = tikhonov_pinv_product(a, torch.eye(20, dtype=a.dtype).expand_as(a))
    else:
        ridge = 0 if normalize else RIDGE_SOFT * torch.eye(20, dtype=a.dtype)
        pinv = newton_raphson_pinv(a + ridge, *step_size(a, normalize), 11)
    for b in range(2):
        for head in range(3):
            g = inverse_filter(
                landmarks, values[b, head], normalize=normalize, solver=solver, steps=11
            )
            assert g.shape == (2, 3, 20)
            u = vectors[b, head]
            expected = pinv[b, head]
            torch.testing.assert_close(
                (u * g[b, head]) @ u.mT,
                expected,
                rtol=1e-6,
                atol=1e-8 * expected.abs().max().item(),
            )


def test_regions_are_the_argmax_of_the_kernel(landmarks):
    q = torch.randn(2, 3, 5000, 8) * 0.7  # more than one block of tokens
    regions, strength = landmark_regions(q, landmarks)
    kernel = gaussian_kernel(q.double(), landmarks)
    assert torch.equal(regions, kernel.argmax(-1))
    torch.testing.assert_close(strength, kernel.amax(-1))


def test_regions_far_from_every_landmark():
    landmarks = torch.tensor([[[[0.0], [10.0]]]])
    regions, strength = landmark_regions(torch.tensor([[[[-500.0], [500.0]]]]), landmarks)
    assert regions.tolist() == [[[0, 1]]]
    assert strength.tolist() == [[[0, 0]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: newton_residuals(x, rule="paper"), "rule must be one of .*'paper'"),
        (lambda x: newton_residuals(x, norm="1"), "norm must be one of .*'1'"),
        (lambda x: newton_residuals(x[0]), r"landmarks must be \[B, heads, m, d\]"),
        (lambda x: inverse_filter(x, x.new_ones(1), solver="svd"), "solver must be one of"),
        (lambda x: spectrum(x[0]), r"landmarks must be \[B, heads, m, d\]"),
        (lambda x: landmark_regions(x[:1], x), r"q must be \[B, heads, N, d\] like landmarks"),
    ],
)
def test_bad_arguments(landmarks, call, message):
    with pytest.raises(ValueError, match=message):
        call(landmarks)
