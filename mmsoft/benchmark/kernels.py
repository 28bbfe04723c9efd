"""Time the Triton kernels against plain torch, torch.compile and the limits of the device.

    python -m mmsoft.benchmark.kernels --out work_dirs/gpu
    python -m mmsoft.benchmark.kernels --device cpu --tokens 256 --landmarks 9 --ways eager

Prints a table and writes `kernels.json`, kept current after every case, which `python -m
mmsoft.benchmark --write-docs` takes. Every case is measured one way before any is measured the
next, because compiling takes long and a kernel that fails may end the process. Times are of the
device, with those until a call returns on the host beside them. The error is against the
definition in float64: no time counts where it is larger than plain torch's allows. The roofline of
a product is the larger of two times, of reading and writing every argument and result once, and of
its products of three TF32 parts, at the measured speeds of a copy and of a TF32 matrix product. The
error of a choice of landmarks is that of their Gram matrix's volume: any of equal ones will do.
On a CPU there is no Triton but its interpreter, and the command only shows that it runs.
"""

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsoft.benchmark.__main__ import positive
from mmsoft.benchmark.cases import compile_or_fail
from mmsoft.benchmark.measure import (
    ceilings,
    commit,
    device_name,
    reason,
    seconds_of,
    synchronize,
    versions,
)
from mmsoft.benchmark.report import MATRICES, PRODUCTS, kernel_table, write_json
from mmsoft.ops import (
    choose_landmarks,
    gaussian_kernel_product,
    reference,
    tikhonov_pinv_product,
    use_backend,
)
from mmsoft.ops.inverse import guarded_newton_pinv

BATCH, HEADS, DIMS = 2, 2, 32
CANDIDATES = (256, 1050)  # of landmarks: stage 1 of 512x512 and of 800x1344
WAYS = ("eager", "triton", "compiled")
CALLS, SECONDS = 50, 0.01  # a sample is so many calls, or fewer that take so long
TOLERANCE = {"forward": 2, "backward": 3}  # times the error of plain torch
FLOOR = 1e-6


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size."""

    operation: str  # "spread", K w; "gather", K^T v; "newton"; "direct"; "choice", of tokens
    tokens: int  # 0 for the inverses
    landmarks: int
    mode: str  # "forward", or "backward" alone


def plan(tokens: list[int], landmarks: list[int]) -> list[KernelCase]:
    """All cases, in order."""
    products = [
        KernelCase(operation, n, m, mode)
        for operation in PRODUCTS
        for m in landmarks
        for n in tokens
        for mode in TOLERANCE
    ]
    inverses = [
        KernelCase(operation, 0, m, mode)
        for operation in ("newton", "direct")
        for m in landmarks
        for mode in TOLERANCE
    ]
    choices = [KernelCase("choice", n, m, "forward") for m in landmarks for n in CANDIDATES]
    return inverses + products + choices


def _definition(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return reference.gaussian_kernel(x, y) @ w


def _exact_newton(a: Tensor) -> Tensor:
    alpha, extra = reference.step_size_softplusplus(a.detach())
    pinv = reference.newton_filter(a.detach(), alpha, 20 + extra)
    return reference.with_theoretical_gradient(a, pinv)


def _exact_solve(a: Tensor, b: Tensor) -> Tensor:
    mu = 0.01 * a.detach().sum(-1).amax(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.inv(a @ a + mu.square() * eye) @ a @ b


def _exact_choice(candidates: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    index, present = reference.choose_landmarks(candidates.cpu(), budget)
    return index.to(candidates.device), present.to(candidates.device)


def volume(candidates: Tensor, index: Tensor, present: Tensor) -> Tensor:
    """What each step of a choice makes largest, the log-determinant of the chosen's Gram matrix.

    In float64, ``[B, heads]``.
    """
    points = candidates.detach().double()
    chosen = points.gather(2, index[..., None].expand(*index.shape, points.shape[-1]))
    gram = reference.gaussian_kernel(chosen, chosen) * (present[..., None] & present[..., None, :])
    return torch.logdet(gram + torch.diag_embed((~present).double()))


def functions(case: KernelCase) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours, and the definition."""
    if case.operation == "choice":
        budget = case.landmarks
        return partial(choose_landmarks, budget=budget), partial(_exact_choice, budget=budget)
    if case.operation in PRODUCTS:
        return gaussian_kernel_product, _definition
    return (
        (guarded_newton_pinv, _exact_newton)
        if case.operation == "newton"
        else (tikhonov_pinv_product, _exact_solve)
    )


def arguments(case: KernelCase, device: str) -> list[Tensor]:
    """Fixed random arguments, laid as the attention layers lay them: heads inside."""
    generator = torch.Generator().manual_seed(0)

    def points(n: int, scale: float) -> Tensor:
        t = scale * torch.randn(BATCH, n, HEADS, DIMS, generator=generator)
        return t.to(device).transpose(1, 2)

    if case.operation == "choice":
        return [points(case.tokens, 0.2)]  # farther apart, one choice is as good as another
    if case.tokens:
        tokens, landmarks = points(case.tokens, 0.4), points(case.landmarks, 0.4)
        if case.operation == "spread":
            tensors = [tokens, landmarks, points(case.landmarks, 1)]
        else:
            tensors = [landmarks, tokens, points(case.tokens, 1)]
    else:
        where = 0.4 * torch.randn(2, MATRICES // 2, case.landmarks, DIMS, generator=generator)
        tensors = [reference.gaussian_kernel(where.double(), where.double()).float().to(device)]
        if case.operation == "direct":
            right = torch.randn(2, MATRICES // 2, case.landmarks, DIMS, generator=generator)
            tensors.append(right.to(device))
    return [t.requires_grad_() for t in tensors]


def steps_of(case: KernelCase, way: str, tensors: list[Tensor]) -> tuple[Callable[[], Any], Any]:
    """A function to time, and the context it runs in."""
    ours, definition = functions(case)
    function = ours
    if way == "compiled":
        compile_or_fail()
        product = case.operation in PRODUCTS
        function = torch.compile(definition if product else ours, dynamic=False)
    context = nullcontext if way == "compiled" else partial(use_backend, way)
    if case.mode == "forward":
        return lambda: function(*(t.detach() for t in tensors)), context
    with context():
        out = function(*tensors)
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True), context


def roofline_ms(case: KernelCase, limits: dict[str, float]) -> float | None:
    """The least time of a product; ``None`` for the others, whose steps wait for each other."""
    if case.operation not in PRODUCTS:
        return None
    n, m, heads = case.tokens, case.landmarks, BATCH * HEADS
    # Forward: x, y, w, result. Backward: grad, x, y, w, and three gradients.
    backward = 3 * n + 4 * m if case.operation == "spread" else 4 * n + 3 * m
    touched = (2 * n + 2 * m, backward)[case.mode == "backward"] * DIMS * 4 * heads
    # Products [n, m] x [m, d]: 2 forward; backward at the least K, g w^T, W y, W^T x, K^T g.
    products = (2, 5)[case.mode == "backward"] * 2 * n * m * DIMS * heads
    copy = touched / limits["copy_gb_s"] / 1e9
    compute = 3 * products / limits.get("tf32_tflops", limits["float32_tflops"]) / 1e12
    return 1e3 * max(copy, compute)


def recorded(step: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph | None:
    """So many calls in a CUDA graph, on the current stream; ``None`` if they cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                step()
    except RuntimeError:
        return None
    return graph


def stream(device: str) -> Any:
    """What is recorded, backward passes too, must have run forward on the same stream."""
    return nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream())


def device_seconds(step: Callable[[], Any], calls: int) -> float:
    """Seconds that the GPU takes for one of so many calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def host_seconds(step: Callable[[], Any], device: str) -> float:
    """Seconds until a call returns, with nothing before it in the device's queue."""
    synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def times_of(step: Callable[[], Any], device: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of a call, and how they were found."""
    calls = max(1, min(CALLS, int(SECONDS / max(seconds_of(step, 1, device), 1e-6))))
    if device == "cpu":
        by, seconds = "clock", [seconds_of(step, calls, device) for _ in range(repeats)]
    else:
        graph = recorded(step, calls)
        by, replay, count = ("graph", graph.replay, 1) if graph else ("events", step, calls)
        device_seconds(replay, count)  # the first replay loads the graph
        seconds = [device_seconds(replay, count) for _ in range(repeats)]
        if graph:
            seconds = [each / calls for each in seconds]
    host = [host_seconds(step, device) for _ in range(repeats)]
    q10, median, q90 = (1e3 * np.quantile(seconds, (0.1, 0.5, 0.9))).tolist()
    found = dict(median_ms=median, q10_ms=q10, q90_ms=q90, timed_by=by)
    return found | dict(host_ms=1e3 * float(np.median(host)))


@cache  # every way is compared with it
def truths(case: KernelCase, device: str) -> tuple[Tensor, ...]:
    """The definition's results in float64."""
    tensors = arguments(case, device)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth: Any = functions(case)[1](*exact)
    if case.mode == "backward":
        truth = torch.autograd.grad(truth, exact, torch.ones_like(truth))
    truth = truth if isinstance(truth, tuple) else (truth,)
    if case.operation == "choice":
        truth = (volume(*tensors, *truth),)
    return tuple(t.detach() for t in truth)


def measured(case: KernelCase, way: str, device: str, repeats: int) -> dict[str, Any]:
    """Time and error of one way; if it cannot run, its reason."""
    found: dict[str, Any] = dict(asdict(case), way=way)
    try:  # the arguments too: no more can be made after a kernel has failed on a GPU
        truth, tensors = truths(case, device), arguments(case, device)
        step, context = steps_of(case, way, tensors)
        with context():
            result = step()
            result = result if isinstance(result, tuple) else (result,)
            if case.operation == "choice":
                result = (volume(*tensors, *result),)
            errors = [(a.double() - b).norm() / b.norm() for a, b in zip(result, truth)]
            found["error"] = float(torch.stack(errors).max().detach())
            found |= times_of(step, device, repeats)
    except Exception as error:  # of a compiler too: the others still count
        found["reason"] = reason(error)
    return found


def judge(entries: list[dict[str, Any]], limit: float | None) -> None:
    """Say of each way of one case whether it is right, and how near to the roofline."""
    plain = next((e["error"] for e in entries if e["way"] == "eager" and "error" in e), 0.0)
    for entry in entries:
        if "error" in entry:
            entry["right"] = entry["error"] <= max(TOLERANCE[entry["mode"]] * plain, FLOOR)
        if "median_ms" in entry and limit is not None:
            entry["roofline"] = limit / entry["median_ms"]


def failed(entries: list[dict[str, Any]], device: str) -> bool:
    """Whether what ran was wrong, or on a GPU a kernel could not run."""
    return any(
        not entry.get("right", device == "cpu" or entry["way"] != "triton") for entry in entries
    )


def ordered(cases: list[KernelCase], ways: list[str]) -> Iterator[tuple[KernelCase, str]]:
    """What to measure, in order; compiled, which takes seconds each, the least of the landmarks.

    Of these the most tokens of each operation.
    """
    most: dict[str, int] = {}
    for case in cases:
        most[case.operation] = max(case.tokens, most.get(case.operation, 0))
    least = min(case.landmarks for case in cases)
    for way in ways:
        for case in cases:
            large = case.landmarks == least and case.tokens == most[case.operation]
            if way != "compiled" or large:
                yield case, way


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m mmsoft.benchmark.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--tokens", nargs="+", type=positive, default=[3136, 16384, 67200])
    p.add_argument("--landmarks", nargs="+", type=positive, default=[49, 64, 128])
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    p.add_argument("--repeats", type=positive, default=11)
    p.add_argument("--out", type=Path, default=Path("work_dirs/gpu"))
    return p


def main() -> None:
    """Run the command line; the exit status tells whether the kernels ran, and all was right."""
    p = parser()
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device; use --device cpu")
    limits = ceilings(args.device, ["float32", "tf32"] if args.device == "cuda" else ["float32"])
    data: dict[str, Any] = dict(
        device=device_name(args.device),
        versions=versions(),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=commit(),
        ceilings=limits,
        repeats=args.repeats,
        kernels=[],
    )
    cases = plan(args.tokens, args.landmarks)
    entries: dict[KernelCase, list[dict[str, Any]]] = {case: [] for case in cases}
    gc.freeze()  # torch collects garbage for every graph that it records
    with stream(args.device):
        for case, way in ordered(cases, args.ways):
            entries[case].append(measured(case, way, args.device, args.repeats))
            judge(entries[case], roofline_ms(case, limits))
            data["kernels"] = [entry for found in entries.values() for entry in found]
            write_json(data, args.out / "kernels.json")
    print(kernel_table(data["kernels"]))
    sys.exit(int(failed(data["kernels"], args.device)))


if __name__ == "__main__":
    main()
