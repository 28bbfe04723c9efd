"""Landmark sampling: a strided convolution, a budget, and images smaller than a patch."""

import pytest
import torch
import torch.nn.functional as F
from operators import opcheck

from mmsoft.ops import landmark_centres, landmark_grid, landmark_patches


def convolve(q, hw, heads, weight):
    """The release: fold the heads into the batch, convolve with stride = kernel."""
    batch, _, channels = q.shape
    d = channels // heads
    image = q.view(batch, *hw, heads, d).permute(0, 3, 4, 1, 2).flatten(0, 1)
    out = F.conv2d(image, weight, stride=weight.shape[-1])
    return out.flatten(2).mT.unflatten(0, (batch, heads))  # [B, heads, m, d]


@pytest.mark.parametrize("hw", [(16, 24), (17, 31), (8, 8), (9, 100)], ids=str)
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_patches_are_a_strided_convolution(hw, stride):
    q = torch.randn(2, hw[0] * hw[1], 6, dtype=torch.float64)
    weight = torch.randn(3, 3, stride, stride, dtype=torch.float64)
    patches = landmark_patches(q, hw, 2, stride)
    ours = patches.flatten(3) @ weight.permute(0, 2, 3, 1).flatten(1).T
    torch.testing.assert_close(ours.transpose(1, 2), convolve(q, hw, 2, weight))


@pytest.mark.parametrize("budget", [1, 5, 48, 49, 1000])
def test_a_budget_keeps_distinct_patches_of_the_grid(budget):
    q = torch.randn(2, 56 * 56, 4)
    every = landmark_patches(q, (56, 56), 2, 8)
    some = landmark_patches(q, (56, 56), 2, 8, budget)
    rows, cols = landmark_grid(56, 56, 8, budget)
    assert some.shape[1] == rows * cols <= budget
    if budget >= 49:
        assert torch.equal(some, every)
    else:  # each kept patch is one of the grid, none twice
        flat = every[0].flatten(1)
        found = [int((flat == patch.flatten()).all(1).nonzero()) for patch in some[0]]
        assert sorted(set(found)) == found


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((200, 336), 256, (16, 16)),
        ((96, 336), 256, (12, 21)),
        ((336, 96), 256, (21, 12)),
        ((160, 160), 399, (19, 20)),
        ((64, 256), 256, (8, 32)),
        ((256, 64), 256, (32, 8)),
        ((128, 128), 256, (16, 16)),
        ((256, 256), 256, (16, 16)),
        ((16, 4000), 9, (2, 4)),
        ((4000, 16), 9, (4, 2)),
        ((3, 3), 256, (1, 1)),
    ],
)
def test_grid_uses_the_budget(size, budget, expected):
    assert landmark_grid(*size, 8, budget) == expected


def test_small_image_is_padded_with_zeros():
    q = torch.randn(1, 3 * 5, 4)
    (patch,) = landmark_patches(q, (3, 5), 2, 8)[0]
    image = patch.view(2, 8, 8, 2)
    torch.testing.assert_close(image[:, :3, :5].permute(1, 2, 0, 3).reshape(15, 4), q[0])
    image[:, :3, :5] = 0
    assert not image.any()


CASES = [((6, 9), 2, None), ((6, 9), 2, 5), ((17, 19), 4, 3), ((3, 5), 4, None)]


@pytest.mark.parametrize(("hw", "stride", "budget"), CASES, ids=str)
def test_gradients_are_those_of_the_transpose(hw, stride, budget):
    q = torch.randn(2, hw[0] * hw[1], 4, dtype=torch.float64, requires_grad=True)

    def patches(q):
        return landmark_patches(q, hw, 2, stride, budget)

    assert torch.autograd.gradcheck(patches, (q,), fast_mode=True)
    assert torch.autograd.gradgradcheck(patches, (q,), fast_mode=True)
    # The backward pass is the transpose: <patches(q), w> = <q, grad>.
    weight = torch.randn_like(patches(q))
    (grad,) = torch.autograd.grad(patches(q), q, weight)
    torch.testing.assert_close((patches(q) * weight).sum(), (q * grad).sum())


@pytest.mark.parametrize(("hw", "stride", "budget"), CASES, ids=str)
def test_custom_operators_pass_opcheck(hw, stride, budget):
    q = torch.randn(2, hw[0] * hw[1], 4, requires_grad=True)
    opcheck(torch.ops.mmsoft.landmark_patches.default, (q, *hw, 2, stride, budget))
    grad = torch.randn_like(landmark_patches(q, hw, 2, stride, budget)).requires_grad_()
    opcheck(torch.ops.mmsoft.landmark_patches_backward.default, (grad, *hw, stride, budget))


@pytest.mark.parametrize(("size", "budget"), [((16, 24), None), ((17, 30), None), ((16, 24), 4)])
def test_centres_are_the_means_of_the_patches(size, budget):
    height, width = size
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    patches = landmark_patches(grid[None], size, 1, 4, budget)
    centres = landmark_centres(height, width, 4, budget)
    torch.testing.assert_close(centres, patches.mean(3)[0, :, 0].cpu())


def test_a_budget_keeps_the_middles_of_equal_intervals():
    """Of 7 rows 3 and of 5 columns 3; from either end as far away."""
    centres = landmark_centres(7 * 4, 5 * 4, 4, 9) / 4 - 3 / 8
    assert centres[:, 0].unique().tolist() == [1, 3, 5]
    assert centres[:, 1].unique().tolist() == [0, 2, 4]
    assert landmark_centres(100 * 2, 2, 2, 10)[:, 0].tolist() == [10.5 + 20 * i for i in range(10)]
