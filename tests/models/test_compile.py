"""torch.compile and torch.export of the operator and the backbones."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from operators import before_torch, needs_torch_2_9
from released import SMALL

from mmsoft.models import SOFTPlusPlus
from mmsoft.models.layers import as_image
from mmsoft.ops import softmax_free_attention

if before_torch("2.6"):
    pytest.skip("one graph, and torch.export, need torch >= 2.6", allow_module_level=True)
from torch.export import Dim, export

SIZES = [(224, 192), (160, 256), (333, 221), (250, 251), (401, 97), (98, 512), (70, 90)]
long = pytest.mark.long
OPTIONS = [
    # torch 2.6 tells sizes below the budget from those above; 2.9 does not.
    pytest.param(dict(solver="direct", max_landmarks=16), marks=needs_torch_2_9),
    pytest.param(dict(solver="direct", max_landmarks=None), marks=long),
    pytest.param(dict(solver="newton", max_landmarks=None), marks=long),
    pytest.param(dict(solver="newton", max_landmarks=16), marks=[long, needs_torch_2_9]),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def few_graphs_serve(sizes, graphs, stages=(0, 1, 2, 3), **options):
    kwargs = dict(options, out_indices=stages, landmarks="released", max_keys=None)
    model = SOFTPlusPlus(SMALL, **kwargs).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for size in sizes:
            image = torch.randn(1, 3, *size)
            for ours, eager, truth in zip(compiled(image), model(image), exact(image.double())):
                assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max()
    assert counter.frame_count <= graphs


@needs_torch_2_9
def test_two_graphs_of_two_stages_serve_every_size():
    """Of all four, a graph takes 20 seconds; the test of torch.export below has them."""
    few_graphs_serve(SIZES[:-1], 2, (0, 1), solver="direct", max_landmarks=16)


# One more for inputs below 20480 elements, for which torch's own convolution takes other kernels.
@long
@pytest.mark.parametrize(("sizes", "graphs"), [(SIZES[:-1], 2), (SIZES, 3)], ids=["large", "all"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_few_graphs_serve_every_size(options, sizes, graphs):
    few_graphs_serve(sizes, graphs, **options)


def test_inductor_compiles_an_image_of_any_size():
    """As torch.compile does by itself once it has seen two sizes."""
    weight = torch.randn(8, 3, 4, 4)

    @torch.compile(dynamic=True)
    def features(x):
        x = F.conv2d(x, weight, stride=4, padding=1)
        return as_image(x.flatten(2).mT, x.shape[2:])

    for size in ((96, 128), (160, 96)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(features(x), F.conv2d(x, weight, stride=4, padding=1))


@long
@pytest.mark.parametrize("landmarks", ["content", "released"])
def test_inductor_compiles_a_backbone_for_any_size(landmarks):
    model = SOFTPlusPlus(SMALL, landmarks=landmarks, max_landmarks=16).eval()
    compiled = torch.compile(model)
    with torch.no_grad():
        for size in ((96, 128), (128, 128), (160, 96)):
            image = torch.randn(1, 3, *size)
            for ours, expected in zip(compiled(image), model(image)):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@long
@pytest.mark.parametrize("solver", ["direct", "newton"])
def test_compiled_training_step(solver):
    """Forward and backward, traced once, at two sizes."""
    model = SOFTPlusPlus(
        SMALL, landmarks="released", max_landmarks=16, solver=solver, norm_eval=True
    ).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((160, 256), (250, 251)):
        image = torch.randn(2, 3, *size)
        gradients = []
        for function in (model, compiled):
            model.zero_grad()
            sum(out.square().mean() for out in function(image)).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for expected, ours in zip(*gradients):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export_with_dynamic_height_and_width(options):
    """Both are up to 1.2e-5 from the features in float64."""
    model = SOFTPlusPlus(SMALL, landmarks="released", max_keys=None, **options).eval()
    sizes = {2: Dim("height", min=64, max=2048), 3: Dim("width", min=64, max=2048)}
    program = export(model, (torch.randn(1, 3, 224, 320),), dynamic_shapes={"x": sizes}).module()
    for size in SIZES:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            for ours, expected in zip(program(image), model(image)):
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@long
@pytest.mark.parametrize("solver", ["direct", "newton"])
def test_operator_compiles_through_the_code_generator(solver):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, v, landmarks):
        return softmax_free_attention(q, v, landmarks, solver=solver)

    for n, m in ((300, 20), (431, 33), (77, 100)):
        tensors = [torch.randn(2, 2, k, 32, requires_grad=True) for k in (n, n, m)]
        results = []
        for function in (softmax_free_attention, compiled):
            kwargs = dict(solver=solver) if function is softmax_free_attention else {}
            out = function(*tensors, **kwargs)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for expected, ours in zip(*results):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1
