"""`--device=pretended`: what a test does wrong on a GPU fails on one that is not there, too."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from on_device import OnDevice, device_type
from pretended import Pretended, pretended
from released import SMALL
from torch import nn

from mmsoft.models import SOFTPlusPlus

pytestmark = pytest.mark.cpu


@pytest.fixture
def gpu():
    with pretended(), OnDevice("cuda"):
        yield


def test_tensors_are_there(gpu):
    x, linear = torch.randn(3), nn.Linear(3, 2)
    made = [
        x, x + 1, x.double(), x.new_tensor([1, 2]), torch.zeros_like(x), torch.ones(3).cuda(),
        torch.zeros(2, device=x.device), torch.ones(3, device="cpu").to(x), linear(x),
        linear.weight, copy.deepcopy(linear).weight, torch.tensor([x.sum()]),
    ]  # fmt: skip
    assert all(isinstance(t, Pretended) and t.device.type == "cuda" for t in made)
    assert device_type() == "cuda"
    assert isinstance(linear.weight, nn.Parameter)
    for back in (x.cpu(), x.to("cpu"), torch.ones(3, device="cpu")):
        assert type(back) is torch.Tensor
    assert x.tolist() == x.cpu().tolist()
    assert float(x.sum()) == float(x.cpu().sum())
    assert type(torch.zeros_like(x, device="cpu")) is torch.Tensor
    half = x.requires_grad_().half()
    (gradient,) = torch.autograd.grad(half.sum(), x)
    assert isinstance(gradient, Pretended)
    assert gradient.dtype == torch.float32
    y = x.detach().clone()
    assert y.add_(1) is y
    with torch.autocast("cuda", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


def test_attention_of_an_empty_batch_is_there(gpu):
    q, mask = torch.randn(0, 1, 4, 8, requires_grad=True), torch.ones(0, 1, 1, 4, dtype=torch.bool)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    for there in (out, gradient):
        assert isinstance(there, Pretended)
        assert there.shape == q.shape


def test_they_do_not_meet_those_of_the_cpu(gpu):
    x, there = torch.ones(3), torch.ones(3, device="cpu")
    for meet in (lambda: x + there, lambda: torch.stack([there, x]), lambda: there.mul_(x)):
        with pytest.raises(RuntimeError, match="on cpu and cuda:0"):
            meet()
    for ask in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises((RuntimeError, TypeError)):
            ask()
    with pytest.raises(AssertionError, match="device"):
        torch.testing.assert_close(x, there)
    assert (x + torch.tensor(1.0, device="cpu")).sum() == 6  # a number may
    assert x.copy_(there) is x


def step():
    torch.manual_seed(0)
    model, x = SOFTPlusPlus(SMALL), torch.randn(2, 3, 64, 96)
    outs = model(x)
    sum(out.square().mean() for out in outs).backward()
    return [*outs, *(p.grad for p in model.parameters())]


def test_numbers_are_those_of_the_cpu():
    expected = step()
    with pretended(), OnDevice("cuda"):
        found = step()
        assert all(isinstance(t, Pretended) for t in found)
        found = [t.detach().cpu() for t in found]
    for ours, numbers in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, numbers.detach(), rtol=1e-3, atol=1e-5)


def test_a_part_of_the_tests_passes_there(root):
    """All of them: `pytest --device=pretended tests/ops tests/models`."""
    paths = [f"tests/ops/test_{name}.py" for name in ("gaussian", "inverse", "landmarks")]
    command = [sys.executable, "-m", "pytest", "-q", "--device=pretended", *paths]
    command += ["tests/models/test_golden.py", "-k", "not 224 and not illcond and not soft-"]
    day = "test_a_cuda_graph_replays_with_other_images", "test_nothing_waits_for_a_gpu"
    command += [f"tests/models/test_gpu.py::{day[0]}[eager-content]"]
    command += [f"tests/models/test_gpu.py::{day[1]}[eager-content-False]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
