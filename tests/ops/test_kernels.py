"""The Triton kernels against their float64 definitions, forward and every gradient.

On a CPU the interpreter runs them. It computes tf32x3 as float32, but for the tests that say so,
and products of bfloat16 wrongly: the kernels have none, they convert what they load.
"""

import itertools
import mmap
import sys
from functools import partial

import numpy as np
import pytest
import torch
from metrics import error
from operators import Calls

from mmsoft.ops import (
    choose_landmarks,
    gaussian_kernel_product,
    newton_raphson_pinv,
    reference,
    softmax_free_attention,
    step_size,
    tikhonov_pinv_product,
    use_backend,
)
from mmsoft.ops.backends import OPERATIONS
from mmsoft.ops.gaussian.operators import product_in_units
from mmsoft.ops.inverse import guarded_newton_pinv
from mmsoft.ops.inverse.operators import tikhonov_solve
from mmsoft.ops.reference import gaussian_kernel as naive

pytestmark = pytest.mark.usefixtures("kernels")
FLOOR = 8 * torch.finfo(torch.float32).eps


def weekly(*cases):
    """Cases that take long; one that has several arguments is a tuple."""
    cases = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def normal(*shape, seed, device, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(device, dtype).requires_grad_()


def points(n, m, d, width, device, scale=0.4, dtype=torch.float32, batch=(1, 2)):
    """x, y, w and a cotangent."""
    shapes, scales = ((n, d), (m, d), (m, width), (n, width)), (scale, scale, 1, 1)
    return [
        normal(*batch, *shape, seed=i, device=device, scale=each, dtype=dtype)
        for i, (shape, each) in enumerate(zip(shapes, scales))
    ]


_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has no name for it


def far_apart(t, dim, device):
    """``t``, the upper half of ``dim`` beyond what 31 bits count, in pages that nobody writes."""
    strides = list(torch.empty(t.shape, device="meta").contiguous().stride())
    strides[dim] = 2**32 // t.shape[dim] + 1
    size = 1 + sum(stride * (length - 1) for stride, length in zip(strides, t.shape))
    if device == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        pages = mmap.mmap(-1, t.element_size() * size, flags)
        memory = torch.frombuffer(pages, dtype=t.dtype)
    else:
        if torch.cuda.mem_get_info()[0] < 1.5 * t.element_size() * size:
            pytest.skip("the GPU has too little memory")
        memory = torch.empty(size, dtype=t.dtype, device=device)
    return memory.as_strided(t.shape, strides).copy_(t.detach())


def empty_cache(device):
    """Other workers need that memory."""
    if device == "cuda":
        torch.cuda.empty_cache()


def within(ours, plain, truth, factor):
    """Error at most ``factor`` times that of plain torch, or some roundings of float32."""
    assert ours.isfinite().all()
    allowed = max(factor * error(plain, truth), FLOOR) + 2 * error(truth.to(ours.dtype), truth)
    assert error(ours, truth) <= allowed


def compare(tensors, grad, function=gaussian_kernel_product):
    """Forward and the three gradients: of the kernels, of eager, and of the definition."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = naive(*exact[:2]) @ exact[2]
    truths = truth, *torch.autograd.grad(truth, exact, grad.double())
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            out = function(*tensors)
            results.append([out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))])
    for i, (ours, plain, truth) in enumerate(zip(*results, truths)):
        assert ours.dtype == plain.dtype
        assert ours.shape == plain.shape
        assert ours.stride() == plain.stride()
        within(ours, plain, truth, 3 if i else 2)


# n, m, channels of points, of values
SHAPES = [
    (63, 7, 32, 32),
    (7, 63, 32, 32),
    (1, 1, 32, 32),
    (5, 1, 16, 1),
    (1, 5, 8, 3),
    (100, 49, 32, 32),
    (49, 100, 32, 32),
    (130, 64, 32, 32),
    (40, 40, 64, 64),
    (40, 40, 24, 48),
    (129, 100, 32, 32),
    (128, 150, 32, 32),
    (180, 170, 8, 8),  # more blocks than one, and more than one part, of either side
    (63, 128, 32, 32),
    *weekly(*((n, m, 32, 32) for n in (63, 1000) for m in (1, 49, 64, 100, 128)
              if (n, m) != (63, 128))),
]  # fmt: skip


@pytest.mark.parametrize(("n", "m", "d", "width"), SHAPES)
def test_product_and_gradients(n, m, d, width, device):
    *tensors, grad = points(n, m, d, width, device)
    compare(tensors, grad)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("d", [16, 32, 64])
def test_blocks_of_points_as_long_as_they_have_channels(block, d, device, monkeypatch):
    """The shapes that flash-sinkhorn says Triton compiles wrongly, on a GPU: docs/cuda.md.

    A product takes all channels of the points in one step and adds up into a matrix, as all do.
    """
    from triton import OutOfResources

    from mmsoft.ops.gaussian import triton as kernels

    launched, kernel = set(), kernels.walk_kernel

    class Noted:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.add((options["M"], options["D"]))
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "walk_kernel", Noted())
    monkeypatch.setattr(kernels, "OTHERS", block)
    *tensors, grad = points(block + 9, block + 3, d, d, device)
    try:
        compare(tensors, grad)
    except OutOfResources as error:  # only blocks of at most 32 are launched by themselves
        pytest.skip(str(error))
    assert launched == {(block, d)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(70, 20), (20, 70)])
def test_low_precision_arguments(n, m, dtype, device):
    *tensors, grad = points(n, m, 32, 32, device, dtype=dtype)
    compare(tensors, grad)


@pytest.mark.parametrize("layout", ["heads inside", "channels outside", "one for all"])
@pytest.mark.parametrize(("n", "m"), [(70, 9), (9, 70)])
def test_strided_and_expanded_arguments(n, m, layout, device):
    change = {
        "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "channels outside": lambda t: t.mT.contiguous().mT,
        "one for all": lambda t: t[:1, :1].expand(t.shape),
    }[layout]
    *tensors, grad = points(n, m, 32, 32, device, batch=(2, 2))
    laid = [change(t).detach().requires_grad_() for t in tensors]
    assert not any(t.is_contiguous() for t in laid)
    compare(laid, change(grad))


# Of three, the stride itself is within 31 bits, and twice the stride is not.
_FAR_BATCH = (3, 1), (1, 3), (1, 1)


def test_arguments_of_more_elements_than_31_bits_count(device):
    """One test for all, as the memory of a GPU has room for few of them at a time."""
    for which, dim in itertools.product(range(4), range(3)):
        n, m = (300, 20) if which in (0, 3) else (20, 300)
        tensors = points(n, m, 8, 8, device, batch=_FAR_BATCH[dim], dtype=torch.float16)
        tensors[which] = far_apart(tensors[which], dim, device).requires_grad_()
        *tensors, grad = tensors
        compare(tensors, grad)
        del tensors, grad
        empty_cache(device)
    x, y, w, _ = points(40, 20, 8, 8, device, batch=(3, 1), dtype=torch.float16)
    for which, dim in itertools.product((0, 1), (0, 1)):  # of the shorter the centre is taken
        close = [t.detach().reshape(*_FAR_BATCH[dim], *t.shape[2:]) for t in (x, y, w)]
        far = close.copy()
        far[which] = far_apart(close[which], dim, device)
        assert torch.equal(gaussian_kernel_product(*far), gaussian_kernel_product(*close))
        assert torch.equal(
            gaussian_kernel_product(far[1], far[0], far[0]),
            gaussian_kernel_product(close[1], close[0], close[0]),
        )
        del far
        empty_cache(device)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize(("n", "m"), [(30, 4), (4, 30), (20, 70), (70, 90)])
def test_units_of_samples_and_the_gradients_that_they_multiply(n, m, divide, device):
    *tensors, grad = points(n, m, 8, 8, device, batch=(2, 2))
    unit = torch.tensor([8.0, 0.25], device=device)[:, None, None, None]
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            out = product_in_units(*tensors, unit, divide=divide)
            results.append([out, *torch.autograd.grad(out, tensors, grad)])
    for ours, plain in zip(*results):
        assert error(ours, plain) < 2e-6


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("n", "m"), [(70, 20), (20, 70), (100, 80)])
def test_gradients_that_are_asked_for(n, m, wanted, device, monkeypatch):
    """They alone are computed, by one walk for those of the queries, one for the other two."""
    from mmsoft.ops.gaussian import triton

    tensors = points(n, m, 16, 16, device, batch=(1, 1))
    every = torch.autograd.grad(gaussian_kernel_product(*tensors[:3]), tensors[:3], tensors[3])
    for i, t in enumerate(tensors[:3]):
        t.requires_grad_(i in wanted)
    out, walks, walk = gaussian_kernel_product(*tensors[:3]), [], triton._walk

    def noted(*args, **units):
        walks.append(args[6:8])
        return walk(*args, **units)

    monkeypatch.setattr(triton, "_walk", noted)
    some = torch.autograd.grad(out, [tensors[i] for i in wanted], tensors[3])
    for grad, i in zip(some, wanted):  # compiled otherwise, a GPU may add up in another order
        assert torch.equal(grad, every[i]) if device == "cpu" else error(grad, every[i]) < 1e-6
    queries, others = 0 in wanted, (1 in wanted, 2 in wanted)
    assert walks == [(True, False)] * queries + [others] * any(others)


@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 1e19, 3e38])
def test_any_finite_coordinate(magnitude, device):
    x = torch.randn(1, 1, 40, 8, device=device).sign() * magnitude
    y = torch.cat((x[:, :, :5], -x[:, :, 5:9]), 2)
    tensors = [x, y, torch.eye(9, device=device).expand(1, 1, 9, 9)]
    out = gaussian_kernel_product(*tensors)
    assert ((out >= 0) & (out <= 1)).all()
    tensors = [t.requires_grad_() for t in tensors]
    grads = torch.autograd.grad(gaussian_kernel_product(*tensors).sum(), tensors)
    assert all(g.isfinite().all() for g in grads)


def test_points_far_from_the_origin_and_outliers(device):
    """Where the expanded square cancels: translation costs nothing, one outlier nothing."""
    x, y, w, _ = (t.detach() for t in points(50, 6, 16, 8, device))
    for shift, outlier in ((1000, 0), (0, 1e4)):
        moved = y.clone()
        moved[..., 0, :] += outlier
        exact = (x.double()[..., :, None, :] - moved.double()[..., None, :, :]).square().sum(-1)
        truth = torch.exp(-0.5 * exact) @ w.double()
        assert error(gaussian_kernel_product(x + shift, moved + shift, w), truth) < 1e-4


def test_not_a_number_is_not_hidden(device):
    x, y, w, _ = (t.detach() for t in points(70, 6, 16, 8, device))
    x[0, 0, 65, 3] = torch.nan
    out = gaussian_kernel_product(x, y, w)
    assert out[0, 0, 65].isnan().all()
    assert out.isnan().sum() == 8
    back = gaussian_kernel_product(y, x, torch.ones(1, 2, 70, 8, device=device))
    assert back[0, 0].isnan().all()
    assert not back[0, 1].isnan().any()


def test_refusals_say_why(device):
    x, y, w, _ = points(4, 3, 80, 4, device)
    with pytest.raises(RuntimeError, match="triton: there are more than 64 channels"):
        gaussian_kernel_product(x, y, w)
    with pytest.raises(RuntimeError, match="triton: an argument is float64"):
        gaussian_kernel_product(x[..., :4].double(), y[..., :4], w)
    with pytest.raises(RuntimeError, match="triton: an argument is empty"):
        gaussian_kernel_product(x[:0, ..., :4], y[:0, ..., :4], w[:0])
    with pytest.raises(RuntimeError, match="triton: an argument has not 4 dimensions"):
        gaussian_kernel_product(x[..., :4], y[..., :4], w[0])
    x, y, w, _ = points(4, 2, 8, 4, device, batch=(1, 1), dtype=torch.float16)
    for dim in (2, 3):
        with pytest.raises(RuntimeError, match=r"128 rows reach over 2\^31 elements"):
            gaussian_kernel_product(x, far_apart(y, dim, device), w)
        empty_cache(device)
    candidates = normal(1, 1, 70, 8, seed=0, device=device).detach()
    mask = far_apart(torch.ones(1, 70, device=device).bool(), 1, device)
    with pytest.raises(RuntimeError, match=r"128 rows reach over 2\^31 elements"):
        choose_landmarks(candidates, 9, mask=mask)
    del mask
    empty_cache(device)


def test_the_stride_of_a_single_row_means_nothing(device):
    x, y, w, _ = points(4, 1, 8, 4, device, batch=(1, 1))
    row = y.detach().as_strided(y.shape, (8, 8, 2**31, 1))
    assert torch.equal(gaussian_kernel_product(x, row, w), gaussian_kernel_product(x, y, w))


def refused(call, *arguments):
    """Where a kernel would read beyond its memory: only plain torch takes them, or refuses too."""
    with pytest.raises(RuntimeError, match=r"triton: an argument has shape \("):
        call(*arguments)
    results = []
    for options in (dict(name="eager"), dict(name="triton", strict=False)):
        with use_backend(**options):
            try:
                results.append(call(*arguments))
            except (RuntimeError, ValueError) as error:
                results.append(str(error))
    if isinstance(results[0], str):
        assert results[0].splitlines()[0] == results[1].splitlines()[0]
    else:
        assert torch.equal(*results)


def test_shapes_that_do_not_fit_are_refused(device):
    x, y, w, grad = (t.detach() for t in points(9, 5, 8, 6, device, batch=(2, 2)))
    for arguments in (
        *((x, y[:1], w), (x, y, w[:1]), (x, y[:, :1], w), (x, y, w[:, :, :4]), (x, y[..., :4], w)),
        (x[:1], y, w),
    ):
        refused(gaussian_kernel_product, *arguments)
    backward = torch.ops.mmsoft.gaussian_kernel_product_backward
    for cotangent in (grad[:1], grad[:, :, :4], grad[..., :4]):
        with pytest.raises(RuntimeError, match="triton: an argument has shape"):
            backward(cotangent, x, y, w, None, False, [True] * 3)
    with pytest.raises(RuntimeError, match="triton: an argument has shape"):
        torch.ops.mmsoft.gaussian_kernel_product(x, y, w, torch.ones(1, 1, 1, 1, device=device))
    a, b = overlapping(5, 1.0, device, (2, 2)), w
    scales = step_size(a, guarded=False)
    refused(partial(newton_raphson_pinv, steps=2), a[..., :4], *scales)
    refused(partial(newton_raphson_pinv, steps=2), a, a[:, :, :1], scales[1])
    for shape in ((1, 1, 1, 1, 1), (7, 1, 1), (7, 2, 1, 1)):
        alpha = torch.full(shape, 0.1, device=device)
        with pytest.raises(RuntimeError, match=r"triton: an argument has shape \("):
            newton_raphson_pinv(a, alpha, scales[1], 2)
    mu = torch.ones(2, 2, 1, 1, device=device)
    for arguments in ((a[:1], mu, b), (a, mu, b[:1]), (a, mu, b[:, :, :4]), (a[..., :4], mu, b)):
        refused(torch.ops.mmsoft.tikhonov_solve, *arguments)
    for operator, arguments in (
        (torch.ops.mmsoft.newton_raphson_pinv_backward, (a, a[:1])),
        (torch.ops.mmsoft.tikhonov_solve_backward, (a, b, b[:1])),
        (torch.ops.mmsoft.tikhonov_solve_backward, (a[:1], b, b)),
    ):
        with pytest.raises(RuntimeError, match="triton: an argument has shape"):
            operator(*arguments)
    candidates, choice = normal(3, 1, 9, 8, seed=0, device=device), torch.ops.mmsoft.landmark_choice
    for mask, reason in (
        (torch.ones(1, 9, device=device).bool(), r"an argument has shape \(1, 9\)"),
        (torch.ones(3, 5, device=device).bool(), r"an argument has shape \(3, 5\)"),
        (torch.ones(3, 9, device=device), "the mask is not of bool"),
    ):
        with pytest.raises(RuntimeError, match=f"triton: {reason}"):
            choice(candidates, 4, 0.1, mask)
    with pytest.raises(RuntimeError, match="triton: an argument has not 4 dimensions"):
        choice(candidates[0], 4, 0.1, None)
    with pytest.raises(RuntimeError, match="triton: an argument has not 4 dimensions"):
        torch.ops.mmsoft.tikhonov_solve(a, mu, mu.new_ones(()))


def test_one_unit_for_all_samples(device):
    """Expanded, it has no memory of its own for each."""
    x, y, w, grad = points(9, 5, 8, 6, device, batch=(3, 1))
    unit = torch.full((1, 1, 1, 1), 4.0, device=device).expand(3, 1, 1, 1)
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            out = product_in_units(x, y, w, unit, divide=True)
            results.append([out, *torch.autograd.grad(out, (x, y, w), grad)])
    for ours, plain in zip(*results):
        assert error(ours, plain) < 2e-6


def overlapping(m, spread, device, batch=(1, 1)):
    """Gram matrices of landmarks, the worse conditioned the smaller ``spread``; float32."""
    points = spread * torch.randn(*batch, m, 8, generator=torch.Generator().manual_seed(m))
    return naive(points.double(), points.double()).float().to(device)


def both(function):
    """Of the kernels and of eager."""
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            results.append(function())
    return results


SOME, MANY = (1, 7, 49, 64), (63, 65, 100, 128)


def several(m, spread, device):
    """Three samples of three heads each: of one, nothing is halved; of another, a head is ``I``."""
    a = overlapping(m, spread, device, (3, 3))
    a[1, 2] = torch.eye(m, device=device)
    a[2] = overlapping(m, 10.0, device, (3,))
    return a.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("m", [*SOME, *weekly(100, 128)])
@pytest.mark.parametrize("spread", [0.5, 0.05])
def test_guarded_start(m, spread, device):
    """``alpha A - cubic A^3``, with maxima over the heads of a sample and no other's."""
    a = several(m, spread, device)
    ours, plain = both(lambda: guarded_newton_pinv(a, 0))
    exact = a.double()
    alpha, extra = reference.step_size_softplusplus(exact)
    assert extra.flatten()[2] == 1  # accepted at once
    assert m == 1 or extra.flatten()[0] == 0
    alpha = alpha * 2**extra
    truth = alpha * exact - extra * alpha**2 / 4 * exact @ exact @ exact
    for start, same, true in zip(ours.flatten(0, 1), plain.flatten(0, 1), truth.flatten(0, 1)):
        within(start, same, true, 2)


@pytest.mark.parametrize("m", [2, 66])
def test_no_candidate_of_the_step_size_is_accepted(m, device):
    """Of no Gram matrix: the smallest one it is, as in plain torch."""
    a = torch.eye(m, device=device).repeat(1, 2, 1, 1)
    a[..., :2, :2] = torch.tensor([[-9999, 10000], [10000, -9999.5]], device=device)
    assert (step_size(a, guarded=True)[0] == 2 / 1024).all()
    ours, plain = both(lambda: guarded_newton_pinv(a, 0))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("m", [*SOME, *weekly(*MANY)])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_guarded_newton_of_several_heads_and_its_gradient(m, spread, device):
    a, steps = several(m, spread, device), 20
    if m > 64:  # whose tiles take the interpreter minutes
        a, steps = a[1:, 1:], 2
    a.requires_grad_()
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def run():
        out = guarded_newton_pinv(a, steps)
        return out, *torch.autograd.grad(out, a, grad)

    exact = a.detach().double()
    alpha, extra = reference.step_size_softplusplus(exact)
    truth = reference.newton_filter(exact, alpha, steps + extra)
    truths = truth, -truth.mT @ grad.double() @ truth.mT
    for ours, plain, exact, factor in zip(*both(run), truths, (2, 3)):
        assert ours.stride() == plain.stride()
        for one, other, true in zip(ours, plain, exact):
            within(one, other, true, factor)


@pytest.mark.parametrize("m", [5, *weekly(70)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_guarded_newton_is_of_no_number_where_plain_torch_is(m, device):
    """A sample's step size is, if one entry of one head is not."""
    a = overlapping(m, 1.0, device, (3, 2))
    a[0, 0, 1, 2] = torch.nan
    a[1, 1, m - 1, m - 1] = torch.inf
    ours, plain = both(lambda: guarded_newton_pinv(a, 1))
    assert ours[0].isnan().all()
    assert torch.equal(ours.isnan(), plain.isnan())
    assert ours[2].isfinite().all()


def test_guarded_newton_of_heads_more_elements_apart_than_31_bits_count(device):
    a = overlapping(5, 1.0, device, (1, 3))
    far = far_apart(a, 1, device)
    assert torch.equal(guarded_newton_pinv(far, 3), guarded_newton_pinv(a, 3))
    del far
    empty_cache(device)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 1, 1, 1), (2, 3, 1, 1)], ids=str)
def test_newton_takes_any_factors_of_whole_matrices(shape, device):
    a = overlapping(9, 1.0, device, (2, 3))
    alpha = torch.full(shape, 0.02, device=device)
    for cubic in (0 * alpha, torch.zeros(2, 1, 1, 1, device=device)):
        ours, plain = both(partial(newton_raphson_pinv, a, alpha, cubic, 3))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


# Of tiles a step takes the interpreter seconds; the first reads the one buffer, the next the other.
NEWTON = [
    *itertools.product(SOME, (True, False), (1.0, 0.05), (20,)),
    (100, True, 1.0, 1),
    (128, False, 0.05, 1),
    *weekly(*itertools.product(MANY, (True, False), (1.0, 0.05), (20,))),
]


@pytest.mark.parametrize(("m", "guarded", "spread", "steps"), NEWTON)
def test_newton_and_its_gradient(m, guarded, spread, steps, device):
    a = overlapping(m, spread, device).mT.requires_grad_()  # strided
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def run():
        if guarded:
            out = guarded_newton_pinv(a, steps)
        else:
            out = newton_raphson_pinv(a, *step_size(a, False), steps)
        return out, *torch.autograd.grad(out, a, grad)

    exact = a.detach().double()
    if guarded:
        alpha, extra = reference.step_size_softplusplus(exact)
        assert m < 100 or extra == 0  # the guard halves
    else:
        alpha, extra = reference.step_size_soft(exact), 0
    truth = reference.newton_filter(exact, alpha, steps + extra)
    truths = truth, -truth.mT @ grad.double() @ truth.mT
    for ours, plain, exact, factor in zip(*both(run), truths, (2, 3)):
        assert ours.stride() == plain.stride()
        within(ours, plain, exact, factor)


SOLVES = [*itertools.product((*SOME, 128), (1.0, 0.05)), (100, 0.05)]
SOLVES += weekly(*itertools.product((63, 65), (1.0, 0.05)), (100, 1.0))


@pytest.mark.parametrize(("m", "spread"), SOLVES)
def test_solve_and_its_gradients(m, spread, device):
    a = overlapping(m, spread, device).requires_grad_()
    columns = 33 if (m, spread) == (128, 0.05) else 5  # for two programs, and for one
    b = torch.randn(1, 1, columns, m, generator=torch.Generator().manual_seed(0)).to(device).mT
    b.requires_grad_()
    grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def run():
        out = tikhonov_pinv_product(a, b)
        return out, *torch.autograd.grad(out, (a, b), grad)

    exact, right = (t.detach().double().requires_grad_() for t in (a, b))
    mu = 0.01 * exact.detach().sum(-1).amax(-1)[..., None, None]
    eye = torch.eye(m, dtype=torch.float64, device=device)
    truth = torch.linalg.inv(exact @ exact + mu.square() * eye) @ exact @ right
    truths = truth, *torch.autograd.grad(truth, (exact, right), grad.double())
    for ours, plain, exact, factor in zip(*both(run), truths, (2, 3, 3)):
        assert ours.stride() == plain.stride()
        within(ours, plain, exact, factor)


@pytest.mark.parametrize(
    ("m", "spread"),
    [(1, 1.0), (7, 1.0), (49, 0.05), (64, 1.0), (100, 0.05),
     *weekly((49, 1.0), (64, 0.05), (100, 1.0), (128, 1.0), (128, 0.05))],
)  # fmt: skip
def test_backward_passes_by_themselves(m, spread, device):
    """Of samples and heads that lie the other way round in memory; one row for all of them."""
    heads, samples = (2, 3) if m < 49 else (1, 1)
    a = overlapping(m, spread, device, (heads, samples)).transpose(0, 1)
    exact = a.double()
    inverse = reference.newton_filter(exact, reference.step_size_softplusplus(exact)[0], 20).float()
    full, row, y = (
        normal(samples, heads, n, m, seed=n, device=device) for n in (m, 1, 33 if m > 64 else 5)
    )
    y = y.mT
    operators = torch.ops.mmsoft
    for name, *arguments in (
        ("newton_raphson_pinv_backward", inverse.mT, full.mT),
        ("newton_raphson_pinv_backward", inverse, row.expand(-1, -1, m, -1)),
        ("tikhonov_solve_backward", a, inverse @ y, y),
    ):
        arguments = [t.detach() for t in arguments]
        ours, plain = both(partial(getattr(operators, name), *arguments))
        truth = OPERATIONS[name].implementations[-1].run(*(t.double() for t in arguments))
        assert ours.stride() == plain.stride()
        for one, other, true in zip(ours.flatten(0, 1), plain.flatten(0, 1), truth.flatten(0, 1)):
            within(one, other, true, 2)


@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_backward_passes_launch_kernels_alone(solver, device, monkeypatch):
    """But for the products of matrices before the solve, which are no operation of ours."""
    a = overlapping(9, 1.0, device).requires_grad_()
    b = torch.ones(1, 1, 9, 4, device=device, requires_grad=True)
    out = guarded_newton_pinv(a) if solver == "newton" else tikhonov_solve(a, b[..., :1, :1], b)
    with Calls() as calls:
        out.sum().backward()
    assert not calls.names & {"bmm", "matmul", "mm", "baddbmm"}


@pytest.mark.parametrize(("m", "samples", "steps"), [(9, 3, 2), (40, 3, 2), (65, 1, 0)])
def test_every_matrix_of_a_batch(m, samples, steps, device):
    """Samples and heads, each with a scale of its own, lie the other way round in memory."""
    a = overlapping(m, 1.0, device, (2, samples)).transpose(0, 1)
    b = torch.randn(2, samples, m, 5, generator=torch.Generator().manual_seed(0)).to(device)
    b = b.transpose(0, 1)
    scales = step_size(a, guarded=False)

    def run():
        out = newton_raphson_pinv(a, *scales, steps)
        return out, tikhonov_pinv_product(a, b)

    for ours, plain in zip(*both(run)):
        for one, other in zip(ours.flatten(0, 1), plain.flatten(0, 1)):
            assert error(one, other) < 1e-5


@pytest.mark.parametrize("function", [newton_raphson_pinv, tikhonov_pinv_product])
def test_inverses_do_not_hide_what_is_not_a_number(function, device):
    a = overlapping(5, 1.0, device, (2, 1))
    a[0, 0, 1, 2] = torch.nan
    one = torch.ones(2, 1, 1, 1, device=device)
    more = {newton_raphson_pinv: (one, one, 3), tikhonov_pinv_product: (a,)}
    out = function(a, *more[function])
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_the_solve_notices_a_matrix_that_is_not_positive(where, device):
    """As a Cholesky factorization does; the others of its batch are solved."""
    a = torch.eye(6, device=device).repeat(2, 1, 1, 1)
    mu = torch.full((2, 1, 1, 1), 1e-3, device=device)
    turned = torch.tensor([[0, 1.0], [-1, 0]], device=device)  # its square is -I
    for i in dict(first=(0,), last=(4,), all=(0, 2, 4))[where]:
        a[0, 0, i : i + 2, i : i + 2] = turned
    b = torch.ones(2, 1, 6, 4, device=device)
    out = tikhonov_solve(a, mu, b)
    assert out[0].isnan().all()
    assert error(out[1], b[1]) < 1e-5


@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_the_whole_operator(solver, device):
    """Every kernel at once; under autocast the same bits."""
    tensors = [
        (0.4 * torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)))
        .to(device)
        .requires_grad_()
        for n in (40, 41, 9)
    ]
    tensors[1] = tensors[1][:, :, 1:].detach().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = reference.softmax_free_attention(*exact, solver=solver)
    truths = truth, *torch.autograd.grad(truth.sum(), exact)

    def run(autocast=False):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = softmax_free_attention(*tensors, solver=solver)
        return out, *torch.autograd.grad(out.sum(), tensors)

    ours, plain = both(run)
    for a, b, c, factor in zip(ours, plain, truths, (2, 3, 3, 3)):
        within(a, b, c, factor)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(autocast=True)))


def test_inverses_say_why_they_refuse(device):
    eye = torch.eye(129, device=device)[None, None]
    with pytest.raises(RuntimeError, match="triton: there are more than 128 landmarks"):
        newton_raphson_pinv(eye, *step_size(eye, guarded=False))
    with pytest.raises(RuntimeError, match="triton: an argument is not float32"):
        guarded_newton_pinv(eye[..., :9, :9].half())
    with pytest.raises(RuntimeError, match="triton: there are more than 64 channels"):
        tikhonov_pinv_product(eye[..., :9, :9], eye[..., :9, :80])
    with pytest.raises(RuntimeError, match="triton: there are more than 128 landmarks"):
        tikhonov_pinv_product(eye, eye[..., :8])


def of_tf32_parts(parts):
    """The interpreter's product as a tensor core's, whose operands have 10 bits after the point.

    As tf32x3 is compiled (``cvt.rna.tf32``): what is left of the rounded operands is a second part,
    of which the tensor core drops the rest. With one ``part``, tf32.
    """
    from triton.runtime.interpreter import TensorHandle

    def dropped(x):
        return (x.view(np.int32) & np.int32(-1 << 13)).view(np.float32)

    def create_dot(self, a, b, total, input_precision, most):
        assert str(input_precision).endswith("TF32x3")
        a, b = (np.ascontiguousarray(t.data) for t in (a, b))
        high = [dropped((x.view(np.int32) + np.int32(1 << 12)).view(np.float32)) for x in (a, b)]
        product = np.matmul(*high)
        if parts == 3:
            low = [dropped(x - rounded) for x, rounded in zip((a, b), high)]
            product += np.matmul(low[0], high[1]) + np.matmul(high[0], low[1])
        return TensorHandle(product + total.data, total.dtype.scalar)

    return create_dot


@pytest.mark.cpu
@pytest.mark.parametrize(("n", "m"), [(70, 20), (20, 70)])
def test_distances_of_three_parts_and_values_of_one_are_not_enough(n, m, device, monkeypatch):
    """Which would be a third of the products with values."""
    from triton.runtime.interpreter import InterpreterBuilder

    tensors = [t.detach() for t in points(n, m, 16, 16, device)[:3]]
    truth = naive(*(t.double() for t in tensors[:2])) @ tensors[2].double()
    with use_backend("eager"):
        plain = gaussian_kernel_product(*tensors)
    three, one, calls = of_tf32_parts(3), of_tf32_parts(1), []

    def by_turns(self, a, b, *more):  # distances, then values, for each block
        calls.append((a.data.shape, b.data.shape))
        return (three if len(calls) % 2 else one)(self, a, b, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", three)
    within(gaussian_kernel_product(*tensors), plain, truth, 2)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", by_turns)
    loses = error(gaussian_kernel_product(*tensors), truth)
    assert len(calls) % 2 == 0
    assert all(b[0] == 16 for _, b in calls[::2])  # channels, added up in a distance
    assert all(b[1] == 16 and a[1] == b[0] == 32 for a, b in calls[1::2])  # points, in a value
    assert loses > 100 * error(plain, truth)
    assert loses < 1e-3  # of rounding


# Two sizes of blocks, and the inverses that lose the most.
PRECISE = [
    (test_product_and_gradients, (63, 7, 32, 32)),
    (test_product_and_gradients, (40, 40, 64, 64)),
    (test_newton_and_its_gradient, (7, True, 0.5, 20)),
    (test_newton_and_its_gradient, (49, False, 0.5, 20)),
    (test_newton_and_its_gradient, (49, True, 0.05, 20)),
    (test_newton_and_its_gradient, (128, True, 0.5, 1)),
    (test_solve_and_its_gradients, (7, 0.5)),
    (test_backward_passes_by_themselves, (49, 0.05)),
    (test_solve_and_its_gradients, (128, 0.5)),
    *weekly(
        (test_solve_and_its_gradients, (49, 0.05)),
        (test_newton_and_its_gradient, (128, True, 0.5, 20)),
        (test_newton_and_its_gradient, (128, False, 0.05, 20)),
    ),
]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("comparison", "arguments"),
    PRECISE,
    ids=lambda value: getattr(value, "__name__", "") or "-".join(map(str, value)),
)
def test_three_parts_of_tf32_are_enough_and_one_is_not(comparison, arguments, device, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_tf32_parts(3))
    comparison(*arguments, device)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_tf32_parts(1))
    with pytest.raises(AssertionError):
        comparison(*arguments, device)


# candidates, budget, tolerance: one block of candidates and several, none beyond the budget
CHOICES = [
    ((2, 3, 40, 8), 12, 0.03),
    ((1, 2, 63, 16), 49, 0.0),
    ((1, 2, 130, 32), 16, 0.03),
    ((1, 2, 5, 8), 12, 0.03),
    ((3, 1, 1, 4), 3, 0.03),
    ((1, 1, 30, 64), 1, 0.0),
    ((1, 2, 130, 3), 40, 0.1),  # enough before the budget is spent
    ((1, 1, 140, 24), 128, 0.0),
    *weekly(((2, 2, 1000, 32), 49, 0.1), ((1, 1, 300, 24), 128, 0.0)),
]


def same_choice(candidates, budget, mask=None, **options):
    ours = choose_landmarks(candidates, budget, mask=mask, **options)
    exact = candidates.detach().double()
    truth = reference.choose_landmarks(exact, budget, mask=mask, **options)
    assert all(map(torch.equal, ours, truth))
    return ours


@pytest.mark.parametrize(("shape", "budget", "tolerance"), CHOICES, ids=str)
def test_the_choice_is_that_of_the_definition(shape, budget, tolerance, device):
    candidates = normal(*shape, seed=0, scale=0.4, device=device)
    same_choice(candidates, budget, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_choice_of_low_precision_candidates(dtype, device):
    same_choice(normal(1, 2, 120, 16, seed=0, scale=0.5, device=device, dtype=dtype), 30)


def test_the_choice_of_candidates_that_are_strided_or_far_away(device):
    """The first one is nearest the mean, wherever the origin is."""
    candidates = normal(2, 70, 3, 8, seed=0, scale=0.3, device=device).detach()
    candidates *= 1 + normal(2, 70, 3, 1, seed=1, scale=0.5, device=device).detach().abs()
    for shift in (0, 30):
        same_choice((candidates + shift).transpose(1, 2), 9)
    same_choice(candidates.permute(0, 3, 1, 2), 5)
    same_choice(candidates[:, :1].expand(-1, 70, -1, -1).transpose(1, 2), 4)


def test_the_choice_of_more_elements_than_31_bits_count(device):
    for dim, total in ((0, 70), (1, 70), (2, 300)):
        shape = (*_FAR_BATCH[dim], total, 8)
        candidates = normal(*shape, seed=0, scale=0.5, device=device, dtype=torch.float16)
        same_choice(far_apart(candidates, dim, device), 9)
        empty_cache(device)
    candidates = normal(3, 1, 300, 8, seed=0, scale=0.5, device=device).detach()
    mask = torch.arange(300, device=device) % 3 < torch.tensor([[3], [2], [1]], device=device)
    same_choice(candidates, 9, far_apart(mask, 0, device))
    same_choice(candidates[:1], 9, far_apart(mask[2:], 1, device))


def test_the_choice_looks_at_no_padding(device):
    """Whatever it holds, in every sample its own; none that is there is one landmark less."""
    candidates = 3 + normal(3, 2, 90, 8, seed=0, scale=0.5, device=device).detach()
    mask = torch.arange(90, device=device) < torch.tensor([[90], [65], [0]], device=device)
    clean = same_choice(candidates, 20, mask)
    assert not clean[1][2].any()
    candidates[1, :, 65:] = torch.tensor([torch.nan, torch.inf, 1e30, 1, 2, 3, 4, 5])
    candidates[2] = torch.nan
    dirty = choose_landmarks(candidates, 20, mask=mask.T.contiguous().T)
    assert all(map(torch.equal, clean, dirty))


def test_the_choice_of_equal_huge_and_lonely_candidates(device):
    index, present = choose_landmarks(torch.full((1, 2, 70, 4), 1.5, device=device), 5, tolerance=0)
    assert (index.any(), present.sum()) == (False, 2)
    for magnitude in (1e19, 3e38):
        signs = normal(1, 1, 70, 3, seed=0, device=device).detach().sign()
        index, present = choose_landmarks(signs * magnitude, 12)
        assert present.sum() == 8  # as many as there are corners
        assert signs[0, 0, index[0, 0, :8]].unique(dim=0).shape[0] == 8
    candidates = normal(1, 1, 200, 8, seed=0, scale=0.1, device=device).detach()
    candidates[0, 0, 137] += 3
    assert choose_landmarks(candidates, 4)[0][0, 0, 1] == 137


def test_the_choice_takes_the_first_of_equal_candidates_and_none_twice(device):
    places = 4 * torch.eye(4, 8, device=device)
    candidates = places.repeat_interleave(torch.tensor([300, 200, 150, 9], device=device), 0)
    index, present = choose_landmarks(candidates[None, None], 4)
    assert present.all()
    assert sorted(index[0, 0].tolist()) == [0, 300, 500, 650]
    candidates = normal(1, 1, 30, 4, seed=0, device=device).detach().repeat(1, 1, 3, 1)
    index, present = choose_landmarks(candidates, 90, tolerance=0)
    assert index[present].unique().numel() == present.sum() >= 30


def test_the_choice_says_why_it_refuses(device):
    candidates = torch.zeros(1, 1, 200, 65, device=device)
    with pytest.raises(RuntimeError, match="triton: more than 128 landmarks are to be chosen"):
        choose_landmarks(candidates, 129)
    with pytest.raises(RuntimeError, match="triton: there are more than 64 channels"):
        choose_landmarks(candidates, 4)
    with pytest.raises(RuntimeError, match="triton: an argument is float64"):
        choose_landmarks(candidates.double(), 4)
