"""What `--device` does to tests, shown on a device that is everywhere."""

import pytest
import torch
import torch._dynamo.testing
from on_device import OnDevice, device_type
from torch import nn

pytestmark = pytest.mark.cpu


def test_tensors_of_no_device_are_made_there():
    with OnDevice("meta"):
        made = [
            torch.zeros(2), torch.tensor([1.0]), torch.arange(3), torch.eye(2), torch.randn(2, 2),
            torch.randint(3, (2,)), torch.rand(2, generator=torch.Generator().manual_seed(0)),
            nn.Linear(2, 3).weight, torch.zeros(2).double(), torch.zeros(2).new_ones(3),
        ]  # fmt: skip
        assert all(tensor.is_meta for tensor in made)
        assert device_type() == "meta"
        assert not torch.zeros(2, device="cpu").is_meta
        assert torch.randn(2, requires_grad=True).is_leaf
        with torch.device("cpu"):
            assert not torch.zeros(2).is_meta
            assert not torch.randn(2).is_meta
    assert device_type() == "cpu"


def test_numbers_are_those_of_a_cpu():
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    again = torch.rand(3)
    torch.manual_seed(0)
    with OnDevice("cpu"):
        assert torch.equal(torch.randn(3, generator=torch.Generator().manual_seed(0)), drawn)
        assert torch.equal(torch.rand(3), again)


def test_what_is_compiled_there_is_one_graph():
    """With a mode of functions, Dynamo breaks graphs at ``unflatten``: tests would run eagerly."""

    def function(x):
        return (x + torch.zeros(6) + torch.rand(6)).unflatten(0, (2, 3)).sin()

    torch._dynamo.reset()
    for device in ("meta", "cpu"):
        counter = torch._dynamo.testing.CompileCounter()
        with OnDevice(device):
            compiled = torch.compile(function, fullgraph=True, backend=counter)
            assert compiled(torch.ones(6)).device.type == device
        assert (counter.frame_count, counter.op_count >= 5) == (1, True)
