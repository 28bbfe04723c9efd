"""What only a GPU can show: that nothing waits for it, and CUDA graphs.

The first, as far as the meta device can tell, is tested everywhere. On a GPU that is pretended the
tests themselves run, and what is recorded is replayed operation by operation.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from metrics import error
from released import SMALL
from required import need_triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waiting import NoTransfers, no_waiting

from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.ops import softmax_free_attention, use_backend

MODELS = {
    "content": lambda **options: SOFTPlusPlus(SMALL, **options),
    "newton": lambda **options: SOFTPlusPlus(SMALL, landmarks="released", **options),
    "direct": lambda **options: SOFTPlusPlus(
        SMALL, landmarks="released", solver="direct", **options
    ),
    "SOFT": lambda **options: SOFT(SMALL, **options),
    "few keys": lambda **options: SOFTPlusPlus(SMALL, max_keys=4, **options),
    "BatchNorm": lambda **options: SOFTPlusPlus(SMALL, norm_cfg=dict(type="BN"), **options),
}


class Recorded(TorchDispatchMode):
    """In the place of a CUDA graph: its operations, which a replay runs into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable and not func.is_view:
                for old, other in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(other)


@pytest.fixture
def gpu(device, monkeypatch):
    if device != "cuda":
        pytest.skip("needs a GPU: --device=cuda")
    if torch.cuda.is_available():
        return
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, function in dict(
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
        synchronize=lambda: None,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: nullcontext(),
        CUDAGraph=Recorded,
        graph=lambda recorded: recorded,
    ).items():
        monkeypatch.setattr(torch.cuda, name, function)


@pytest.fixture(params=["eager", "triton"])
def backend(request, gpu):
    """Plain torch, and the kernels."""
    if request.param == "triton":
        need_triton()
        if not torch.cuda.is_available():
            pytest.skip("no kernel runs on a GPU that is pretended")
    with use_backend(request.param):
        yield request.param


def images(seed):
    """Two of unlike size in a batch, the second one filled up."""
    batch = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed))
    batch[1, :, 70 + seed :] = 0
    return batch


def trained(model):
    """A function that takes a training step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step(batch):
        optimizer.zero_grad()
        loss = sum(out.float().square().mean() for out in model(batch))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def test_what_waits_is_found_on_a_gpu(gpu):
    if not torch.cuda.is_available():
        pytest.skip("nothing waits for a GPU that is pretended")
    x = torch.ones(3)
    with no_waiting():
        (x + 1).sum()
        for ask in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.cpu()):
            with pytest.raises(RuntimeError, match="synchronizing"):
                ask()
    assert float(x.sum()) == 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_waits_for_a_gpu(name, autocast, backend):
    model, batch = MODELS[name](drop_rate=0.1, drop_path_rate=0.1), images(0)
    step = trained(model.train())

    def both():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = step(batch)
            with torch.no_grad():
                return loss, *model.eval()(batch)

    both()  # compiles kernels, makes handles
    model.train()
    with no_waiting():
        found = both()
    assert all(out.isfinite().all() for out in found)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_kernels_is_the_same(name, gpu):
    """Features and gradients beside plain torch's."""
    need_triton()
    if not torch.cuda.is_available():
        pytest.skip("no kernel runs on a GPU that is pretended")
    model, batch, results = MODELS[name](norm_eval=True).train(), images(0), []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            outs = model(batch)
            loss = sum(out.square().mean() for out in outs)
            results.append([*outs, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*reversed(results), strict=True):
        assert error(ours, expected) < 1e-3


@pytest.mark.cpu
@pytest.mark.parametrize("name", MODELS)
def test_no_value_is_asked_for(name):
    with torch.device("meta"):
        model = MODELS[name](drop_rate=0.1, drop_path_rate=0.1)
        batch = torch.empty(2, 3, 96, 128)
    step = trained(model.train())
    with NoTransfers():
        assert step(batch).is_meta
        with torch.no_grad():
            model.eval()(batch)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_graph_replays_with_other_images(name, backend):
    """With other padding too. 1e-5: the libraries may take other kernels while they record."""
    model, batch = MODELS[name]().eval(), images(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = model(batch)
    for seed in (1, 2):  # recording ran nothing
        other = images(seed)
        batch.copy_(other)
        graph.replay()
        for ours, expected in zip(outs, model(other), strict=True):
            assert error(ours, expected) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_tf32_that_is_allowed_does_not_reach_the_operator(solver, backend, gpu):
    """Neither pass; a plain product shows that it is there."""
    if backend == "triton":
        need_triton()
        if not torch.cuda.is_available():
            pytest.skip("no kernel runs on a GPU that is pretended")
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, 300, 32), (2, 2, 300, 32), (2, 2, 49, 32)
    q, v, landmarks = (torch.randn(*shape, generator=generator) / 2 for shape in shapes)
    errors, known = [], [t.double().requires_grad_() for t in (q, v, landmarks)]
    out = softmax_free_attention(*known, solver=solver)
    truth = out, *torch.autograd.grad(out.sum(), known)
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed  # until the end of the test
        ours = [t.clone().requires_grad_() for t in (q, v, landmarks)]
        with use_backend(backend):
            out = softmax_free_attention(*ours, solver=solver)
            found = out, *torch.autograd.grad(out.sum(), ours)
        errors.append([error(a, b) for a, b in zip(found, truth)])
    a = ours[0].detach()
    product, exact = a @ a.mT, a.double() @ a.double().mT
    assert errors[0] == pytest.approx(errors[1], rel=0.5)
    # Older ones have none, and that variable takes it away.
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        assert error(product, exact) > 1e-5 or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
