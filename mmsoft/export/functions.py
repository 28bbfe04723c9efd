"""Our custom operators in those of ONNX, which has no linear algebra.

The inverses are written out for each layer. The choice of landmarks, whose steps are not known
beforehand, is a loop: onnxscript reads its source, where the annotations tell the types, and every
name has to be the operator set's, an argument or a constant.
"""

import math
from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from onnxscript import BOOL, FLOAT, INT64
from onnxscript import opset18 as op

from mmsoft.ops.inverse import TIKHONOV
from mmsoft.ops.landmarks.choice import FEW

from .detections import ABSENT

_OURS = onnxscript.values.Opset("mmsoft", 1)


def _scales(smallest: float) -> list[float]:
    """Factors by which Newton's iterates for eigenvalues in ``[smallest, 1]`` converge fastest.

    Scaled by ``2 / (l + u)`` the eigenvalues of ``M X`` lie evenly around 1, and a step maps
    ``[1 - e, 1 + e]`` to ``[1 - e^2, 1]`` (Pan and Schreiber 1991). Ten for 1e-4, to below 1e-8.
    """
    low, scales = smallest, list[float]()
    while low < 1 - 1e-8:
        scales.append(2 / (low + 1))
        low = 1 - ((1 - low) / (1 + low)) ** 2
    return scales


SCALES = _scales(TIKHONOV**2 / (1 + TIKHONOV**2))


@onnxscript.script(_OURS, default_opset=op)
def centred(candidates: FLOAT[...], there: BOOL[...]) -> FLOAT[...]:
    """Candidates of all images and heads, ``[P, M, d]``, around a point in their midst."""
    shape = op.Shape(candidates)
    points = op.Reshape(candidates, op.Concat([-1], op.Slice(shape, [2], [4]), axis=0))
    points = op.Where(there, op.Clip(points, -1e9, 1e9), 0.0)
    squared = op.ReduceSumSquare(points, [2], keepdims=1)
    squared = op.Where(there, squared, op.Constant(value_float=math.inf))
    near = op.CastLike(squared <= 16.0 * op.ReduceMin(squared, [1], keepdims=1), points)
    middle = op.ReduceSum(near * points, [1], keepdims=1) / op.ReduceSum(near, [1], keepdims=1)
    return points - middle


@onnxscript.script(_OURS, default_opset=op)
def nearest_their_mean(points: FLOAT[...], there: BOOL[...]) -> INT64[...]:
    """The first landmark, ``[P, 1, 1]``."""
    counted = op.CastLike(there, points)
    total = op.ReduceSum(points * counted, [1], keepdims=1)
    mean = total / op.Max(op.ReduceSum(counted, [1], keepdims=1), 1.0)
    distance = op.ReduceSumSquare(points - mean, [2], keepdims=1)
    distance = op.Where(there, distance, op.Constant(value_float=math.inf))
    return op.ArgMin(distance, axis=1, keepdims=1)


@onnxscript.script(_OURS, default_opset=op)
def choice_of_few(
    points: FLOAT[...], there: BOOL[...], nearest: INT64[...], budget: INT64, tolerance: FLOAT
) -> tuple[INT64[...], BOOL[...]]:
    """As :func:`choice`, of so few that their Gram matrix is stored: half the nodes of a step."""
    total = op.Squeeze(op.Shape(points, start=1, end=2))
    kept = op.Min(total, budget)
    half = op.ReduceSumSquare(points, [2], keepdims=1) * 0.5
    gram = op.MatMul(points, op.Transpose(points, perm=[0, 2, 1])) - half
    gram = op.Exp(op.Min(gram - op.Transpose(half, perm=[0, 2, 1]), 0.0))
    everyone = op.Range(0, total, 1)
    gram = op.Where(op.Unsqueeze(everyone, [1]) == everyone, 1.0, gram)  # [P, M, M]
    # [P, 1, M]: the diagonal of gram, and less than nothing of what is not there.
    residual = op.Where(op.Transpose(there, perm=[0, 2, 1]), 1.0, -1.0)
    left = op.ReduceMax(residual, [2], keepdims=1)
    left = op.Where(left > 0.0, left, op.Constant(value_float=math.inf))

    @onnxscript.graph()
    def step(  # type: ignore[no-untyped-def]
        j: INT64,
        goes_on: BOOL,
        gram: FLOAT[...],
        residual: FLOAT[...],
        pivot: INT64[...],
        left: FLOAT[...],
    ):
        row = op.GatherND(gram, pivot, batch_dims=1)  # [P, 1, M]
        share = row / left
        schur = gram - op.MatMul(op.Transpose(row, perm=[0, 2, 1]), share)
        rest = residual - row * share
        largest = op.ReduceMax(rest, [2], keepdims=1)
        another = op.ReduceMax(largest, keepdims=0) > tolerance
        following = op.ArgMax(rest, axis=2, keepdims=1)
        remains = op.Where(largest > tolerance, largest, op.Constant(value_float=math.inf))
        taken = op.Identity(pivot)
        before = op.Identity(left)
        return another, schur, rest, following, remains, taken, before

    _, _, _, _, pivots, lefts = op.Loop(kept, True, gram, residual, nearest, left, body=step)
    pivots = op.Transpose(op.Squeeze(pivots, [2, 3]), perm=[1, 0])  # [P, steps]
    lefts = op.Transpose(op.Squeeze(lefts, [2, 3]), perm=[1, 0])
    infinite = op.Constant(value_float=math.inf)
    missing = op.Concat([0, 0, 0], kept - op.Shape(lefts, start=1, end=2), axis=0)
    taken = op.Pad(lefts, missing, infinite) < infinite
    return op.Where(taken, op.Pad(pivots, missing), 0), taken


@onnxscript.script(_OURS, default_opset=op)
def choice(
    points: FLOAT[...], there: BOOL[...], nearest: INT64[...], budget: INT64, tolerance: FLOAT
) -> tuple[INT64[...], BOOL[...]]:
    """``mmsoft.ops.choose_landmarks`` of ``[P, M, d]``, centred: ``[P, k]``."""
    total = op.Squeeze(op.Shape(points, start=1, end=2))
    kept = op.Min(total, budget)
    half = op.ReduceSumSquare(points, [2], keepdims=1) * 0.5  # [P, M, 1]
    # The exponents are products of [p, 1, -half] with [p, -half, 1], as elsewhere.
    ones = half * 0.0 + 1.0
    left_side = op.Concat(points, ones, -half, axis=2)
    # What is not there is far from all: its rows of the factor are 0.
    away = op.Where(there, -half, -1e30)
    right_side = op.Transpose(op.Concat(points, away, ones, axis=2), perm=[0, 2, 1])

    first = op.MatMul(op.GatherND(left_side, nearest, batch_dims=1), right_side)
    everyone = op.Unsqueeze(op.Range(0, total, 1), [0, 1])  # [1, 1, M]
    first = op.Where(everyone == nearest, 1.0, op.Exp(op.Min(first, 0.0)))
    first = first * op.CastLike(op.GatherND(there, nearest, batch_dims=1), first)
    # What is unexplained, nearly 0 of those taken, and the factor's rows: one variable, because two
    # may change places in a loop of onnxscript 0.7.
    residual = op.Where(op.Transpose(there, perm=[0, 2, 1]), 1.0, -1.0) - first * first
    state = op.Concat(residual, first, axis=1)  # [P, 1 + j, M]
    for _ in range(kept - 1):
        residual = op.Slice(state, [0], [1], [1])  # [P, 1, M]
        factor = op.Slice(state, [1], [2147483647], [1])
        pivot = op.ArgMax(residual, axis=2, keepdims=1)  # [P, 1, 1]
        left = op.ReduceMax(residual, [2], keepdims=1)
        at_pivot = everyone == pivot  # [P, 1, M]
        row = op.MatMul(op.GatherND(left_side, pivot, batch_dims=1), right_side)
        row = op.Where(at_pivot, 1.0, op.Exp(op.Min(row, 0.0)))
        before = op.MatMul(op.CastLike(at_pivot, row), op.Transpose(factor, perm=[0, 2, 1]))
        row = row - op.MatMul(before, factor)
        row = row / op.Sqrt(op.Where(left > tolerance, left, op.Constant(value_float=math.inf)))
        state = op.Concat(residual - row * row, factor, row, axis=1)
        ended = op.ReduceMax(left, keepdims=0) <= tolerance
        if ended:
            break
    rows = op.Slice(state, [1], [2147483647], [1])
    missing = kept - op.Shape(rows, start=1, end=2)
    rows = op.Pad(rows, op.Concat([0, 0, 0, 0], missing, [0], axis=0))
    pivots = op.ArgMax(rows, axis=2, keepdims=0)  # [P, k]: each is largest at its pivot
    taken = op.ReduceMax(rows, [2], keepdims=0) > 0.0
    return op.Where(taken, pivots, 0), taken


def _number(value: Any) -> Any:
    """A number of tokens or landmarks: of this program, or an expression of its sizes."""
    return op.Constant(value_int=value) if isinstance(value, int) else value


def newton_raphson_pinv(a: Any, alpha: Any, cubic: Any, steps: int) -> Any:
    """``mmsoft.ops.newton_raphson_pinv``, step after step: a loop would cost more than it does."""
    cube = op.MatMul(a, op.MatMul(a, a))
    x = op.Sub(op.Mul(alpha, a), op.Mul(cubic, cube))
    for _ in range(steps):
        x = op.Sub(op.Mul(x, _float(2)), op.MatMul(x, op.MatMul(a, x)))
    return x


def tikhonov_solve(a: Any, mu: Any, b: Any) -> Any:
    """``(A^2 + mu^2 I)^-1 b``, for ``mu`` = 0.01 times the largest row sum, by products alone.

    Newton's iteration for the inverse, then two corrections of the solution, whose residual is
    formed with ``A``, not ``A^2``: closer to the exact result than Cholesky's factor in float32.
    """
    ridge = op.Mul(mu, mu)
    largest = op.Mul(ridge, _float(1 + TIKHONOV**-2))
    tokens = op.Range(0, op.Squeeze(op.Shape(a, start=-1)), 1)
    eye = op.CastLike(op.Equal(op.Unsqueeze(tokens, [1]), op.Unsqueeze(tokens, [0])), a)
    m = op.Div(op.Add(op.MatMul(a, a), op.Mul(ridge, eye)), largest)
    first, *scales = SCALES
    x = op.Sub(op.Mul(eye, _float(2 * first)), op.Mul(m, _float(first**2)))
    for scale in scales:
        product = op.MatMul(x, op.MatMul(m, x))
        x = op.Sub(op.Mul(x, _float(2 * scale)), op.Mul(product, _float(scale**2)))
    solution = op.MatMul(x, op.Div(b, largest))
    for _ in range(2):
        found = op.Add(op.MatMul(a, op.MatMul(a, solution)), op.Mul(ridge, solution))
        solution = op.Add(solution, op.MatMul(x, op.Div(op.Sub(b, found), largest)))
    return solution


def landmark_choice(candidates: Any, budget: Any, tolerance: float, mask: Any = None) -> Any:
    """``mmsoft.ops.choose_landmarks``."""
    if mask is None:
        there = op.Cast(op.Constant(value_ints=[1]), to=onnxscript.BOOL.dtype)
    else:
        there = op.Unsqueeze(mask, [1])
    there = op.Expand(there, op.Shape(candidates, end=3))
    size = op.Concat(
        op.Constant(value_ints=[-1]),
        op.Shape(candidates, start=2, end=3),
        op.Constant(value_ints=[1]),
        axis=0,
    )
    there = op.Reshape(there, size)  # [P, M, 1]
    total = candidates.shape[2]
    choose = choice_of_few if isinstance(total, int) and total <= FEW else choice
    points = centred(candidates, there)
    nearest = nearest_their_mean(points, there)
    found = choose(points, there, nearest, _number(budget), op.Constant(value_float=tolerance))
    shape = op.Concat(op.Shape(candidates, end=2), op.Constant(value_ints=[-1]), axis=0)
    return tuple(op.Reshape(each, shape) for each in found)


def suppress(boxes: Any, scores: Any, iou_threshold: float, most: int) -> Any:
    """``mmsoft_export::suppress``: the operator of ONNX gives numbers of kept boxes."""
    numbers = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[ABSENT]),  # a score must be above it
    )  # [kept, 3]: image, class, box
    numbers = op.Gather(numbers, op.Constant(value_ints=[0, 2]), axis=1)
    true = op.Cast(op.Constant(value_ints=[1]), to=BOOL.dtype)
    kept = op.Expand(true, op.Shape(numbers, end=1))
    return op.ScatterND(op.Less(scores, scores), numbers, kept)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """``torch.nn.functional.gelu``, in the order of products in which onnxruntime knows it."""
    if approximate == "none":
        return op.Mul(
            op.Mul(x, op.Add(op.Erf(op.Div(x, _float(math.sqrt(2)))), _float(1))), _float(0.5)
        )
    inner = op.Mul(op.Pow(x, _float(3)), _float(0.044715))
    inner = op.Mul(op.Add(x, inner), _float(math.sqrt(2 / math.pi)))
    return op.Mul(op.Mul(x, _float(0.5)), op.Add(op.Tanh(inner), _float(1)))


def _float(value: float) -> Any:
    return op.Constant(value_float=value)


def translations() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export``: operator -> the function that stands for it."""
    ops = torch.ops.mmsoft
    return {
        ops.newton_raphson_pinv.default: newton_raphson_pinv,
        ops.tikhonov_solve.default: tikhonov_solve,
        ops.landmark_choice.default: landmark_choice,
        torch.ops.mmsoft_export.suppress.default: suppress,
        torch.ops.aten.gelu.default: _gelu,
    }
