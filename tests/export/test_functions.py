"""The operators as functions of ONNX, run by onnxruntime, against those of `mmsoft.ops`."""

import numpy as np
import pytest
import torch

from mmsoft.ops import choose_landmarks, gaussian_gram, newton_raphson_pinv, step_size
from mmsoft.ops.inverse import TIKHONOV

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmsoft.export import functions  # noqa: E402  (needs onnxscript)


def run(function, *arguments):
    """Call a function of the domain `mmsoft` in a model of its own."""
    body = function.to_function_proto()
    node = onnx.helper.make_node(body.name, body.input, body.output, domain=body.domain)
    arrays = [np.asarray(argument) for argument in arguments]
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None
        )
        for name, array in zip(body.input, arrays)
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in body.output]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "call", inputs, outputs),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(body.domain, 1)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(body.input, arrays, strict=True)))
    return [torch.from_numpy(array) for array in found]


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


class Call(torch.nn.Module):
    """An operator, to be exported by itself."""

    def __init__(self, operator, *constants):
        super().__init__()
        self.operator, self.constants = operator, constants

    def forward(self, *tensors):
        return self.operator(*tensors, *self.constants)


def of_any_size(call, *shapes):
    """A function of arrays: an operator, exported for matrices whose sides `m` are any."""
    m = torch.export.Dim("m", min=1, max=4096)
    dims = [{i: m for i, side in enumerate(shape) if side == "m"} for shape in shapes]
    sample = [torch.rand([5 if side == "m" else side for side in shape]) for shape in shapes]
    program = torch.onnx.export(
        torch.export.export(call, tuple(sample), dynamic_shapes={"tensors": tuple(dims)}),
        dynamo=True,
        verbose=False,
        opset_version=18,
        custom_translation_table=functions.translations(),
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    content = program.model_proto.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*tensors):
        (found,) = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        return torch.from_numpy(found)

    return run


@pytest.fixture(scope="module")
def newton():
    call = Call(torch.ops.mmsoft.newton_raphson_pinv, 20)
    return of_any_size(call, (2, 3, "m", "m"), (2, 1, 1, 1), (2, 1, 1, 1))


@pytest.fixture(scope="module")
def solve():
    call = Call(torch.ops.mmsoft.tikhonov_solve)
    return of_any_size(call, (2, 3, "m", "m"), (2, 3, 1, 1), (2, 3, "m", 32))


@pytest.mark.parametrize("m", [1, 7, 63])
def test_newton(newton, m):
    a = gaussian_gram(torch.randn(2, 3, m, 16) * 0.3)
    alpha, cubic = step_size(a, guarded=True)
    expected = newton_raphson_pinv(a.double(), alpha.double(), cubic.double())
    assert error(newton(a, alpha, cubic), expected) < 1e-3  # of the largest entries; 4e-5 measured


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 1, 3])
@pytest.mark.parametrize("m", [1, 7, 63, 256])
def test_solve_is_as_good_as_a_cholesky_factorization(solve, m, spread):
    """From matrices of ones, nearly, to the identity."""
    a = gaussian_gram(torch.randn(2, 3, m, 16).double() * spread)
    b = torch.randn(2, 3, m, 32).double()
    mu = TIKHONOV * a.sum(-1).amax(-1)[..., None, None]
    eye = torch.eye(m, dtype=torch.float64)
    expected = torch.linalg.solve(a @ a + mu**2 * eye, a @ b)
    a, mu, b = a.float(), mu.float(), b.float()
    found = solve(a, mu, a @ b)
    factored = torch.ops.mmsoft.tikhonov_solve(a, mu, a @ b)
    assert error(found, expected) <= 2 * error(factored, expected) + 1e-6
    assert error(found, expected) < 3e-3  # 7e-4 measured, at a spread of 0.01


def test_scales_are_no_more_than_it_takes():
    """To bring every eigenvalue that there may be to 1, by the iteration that they scale."""
    smallest = TIKHONOV**2 / (1 + TIKHONOV**2)
    eigenvalues = torch.logspace(0, 1, 1001, base=smallest, dtype=torch.float64)
    inverses, far = torch.ones_like(eigenvalues), []
    for scale in functions.SCALES:
        inverses = 2 * scale * inverses - scale**2 * inverses * eigenvalues * inverses
        far.append(float((eigenvalues * inverses - 1).abs().max()))
    assert far[-1] < 1.1e-8 < far[-2]


@pytest.mark.parametrize(
    ("candidates", "budget", "tolerance"),
    [(1, 5, 0.1), (7, 3, 0.1), (100, 20, 1e-3), (300, 300, 1e-2), (525, 49, 0.1)],
)
@pytest.mark.parametrize("spread", [0.1, 1])
@pytest.mark.parametrize("function", ["choice", "choice_of_few"])
def test_choice(candidates, budget, tolerance, spread, function):
    check_choice(candidates, budget, tolerance, spread, function, 1)


@pytest.mark.parametrize(
    ("candidates", "budget", "tolerance"),
    [(1, 5, 0.1), (7, 3, 0.1), (100, 20, 1e-2), (300, 300, 1e-1), (525, 49, 0.1)],
)
@pytest.mark.parametrize("function", ["choice", "choice_of_few"])
@pytest.mark.parametrize("share", [0.6, 0])
def test_choice_of_what_a_mask_leaves(candidates, budget, tolerance, function, share):
    check_choice(candidates, budget, tolerance, 0.1, function, share)


def check_choice(candidates, budget, tolerance, spread, function, share):
    """Beside eager; of the second image nothing may be left."""
    points = torch.randn(2, 3, candidates, 16) * spread + 5
    mask = torch.rand(2, candidates) < share
    mask[0, 0] = True
    there = mask[:, None, :, None].expand(2, 3, -1, 1).flatten(0, 1).numpy()
    (centred,) = run(functions.centred, points, there)
    (nearest,) = run(functions.nearest_their_mean, centred, there)
    choice = getattr(functions, function)
    limits = np.int64(budget), np.float32(tolerance)
    found = run(choice, centred, there, nearest, *limits)
    expected = choose_landmarks(points, budget, tolerance=tolerance, mask=mask)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=0, atol=0)
