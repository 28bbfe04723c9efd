"""Measuring: interleaved times, and peak memory in fresh processes."""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import multiprocessing
import platform
import random
import re
import resource
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmsoft import flops
from mmsoft.benchmark.cases import DTYPES, Case, make_model, make_step, precision

# A call that takes longer, or an image that is larger, is repeated `slow_repeats` times only.
SLOW_SECONDS, LARGE_PIXELS = 4.0, 1024**2
LONG_SECONDS = 20.0  # to warm up for so long changes nothing: the first call is the first sample
SAMPLE_SECONDS = 0.05  # a sample is at least that long: faster steps are repeated within it
# Imported once, by the server that the measuring processes are forked from.
PRELOAD = ("torch", "mmsoft.models", "mmdet.models", "mmseg.models", "mmpretrain.models")
EMULATED = 0.01  # TFLOP/s: a CPU without products in a dtype, such as bfloat16
Log = Callable[[str], None]


def synchronize(device: str) -> None:
    """Wait until the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def quiet() -> None:
    """Silence warnings and logs of the libraries."""
    warnings.filterwarnings("ignore")
    MMLogger.get_instance("mmengine").setLevel(logging.ERROR)
    logging.getLogger("mmengine").setLevel(logging.ERROR)


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


# --------------------------------------------------------------------------------------------- time


def seconds_of(step: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds of one of so many calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def measure_times(
    cases: Sequence[Case], models: dict[Any, nn.Module], repeats: int, slow_repeats: int, log: Log
) -> tuple[dict[Case, dict], dict[Case, str]]:
    """Time the cases in turns, one sample each per round, so that drift affects all equally.

    Every case is warmed at its shape first; of one that takes ``LONG_SECONDS`` that call counts.

    ``models`` are built models by :func:`model_key`; those missing are added. Returns the times of
    each case in milliseconds, and the reason of each case that could not be run.
    """
    steps: dict[Case, Callable[[], Any]] = {}
    calls: dict[Case, int] = {}
    wanted: dict[Case, int] = {}
    skipped: dict[Case, str] = {}
    samples: dict[Case, list[float]] = {}
    for case in cases:
        try:
            key = model_key(case)
            if key not in models:
                models[key] = make_model(case)
            step = make_step(models[key], case)
            seconds = seconds_of(step, 1, case.device)
            if seconds < 1 or case.compiled:  # the first call compiles
                seconds = seconds_of(step, 1, case.device)
        except Exception as error:  # of a compiler too: the other cases still count
            skipped[case] = reason(error)
            log(f"{case.name}: left out ({skipped[case]})")
            continue
        log(f"{case.name}: warm, {1e3 * seconds:.4g} ms")
        steps[case] = step
        calls[case] = min(max(math.ceil(SAMPLE_SECONDS / seconds), 1), 100)
        large = case.size[0] * case.size[1] > LARGE_PIXELS
        slow = seconds > SLOW_SECONDS or large
        wanted[case] = slow_repeats if slow else repeats
        samples[case] = [1e3 * seconds] if seconds > LONG_SECONDS else []
    for turn in range(max(wanted.values(), default=0)):
        start = time.perf_counter()
        order = list(steps.items())
        random.Random(turn).shuffle(order)  # else each always follows the same neighbour
        for case, step in order:
            if len(samples[case]) >= wanted[case]:
                continue
            try:
                samples[case].append(1e3 * seconds_of(step, calls[case], case.device))
            except Exception as error:
                skipped[case] = reason(error)
                log(f"{case.name}: left out ({skipped[case]})")
                del steps[case], samples[case]
        log(f"round {turn + 1} of {max(wanted.values())}: {time.perf_counter() - start:.1f} s")
    times = {}
    for case, values in samples.items():
        q10, median, q90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
        found = dict(median_ms=median, q10_ms=q10, q90_ms=q90, min_ms=min(values))
        times[case] = found | dict(repeats=len(values))
    return times, skipped


def model_key(case: Case) -> tuple:
    """Cases with the same key can share a model."""
    # Linformer's weights know the length, as do position embeddings, and a file knows its size.
    size = case.size if case.section in ("onnx", "operator", "sequence") else None
    return case.section, case.name, case.mode, case.device, case.compiled, case.runtime, size


# ------------------------------------------------------- memory, parameters, multiply-adds, traffic


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1])  # KiB


def _peak_resident_mib(step: Callable[[], Any]) -> float:
    """How far the resident memory of this process rises above what it is before the call."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc: give freed memory back first
        ctypes.CDLL(None).malloc_trim(0)
    idle = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is now
        step()
        peak = _status("VmHWM")
    except PermissionError:
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - idle) / 1024


def _peak_cuda_mib(step: Callable[[], Any]) -> float:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - idle) / 2**20


class _Traffic(TorchDispatchMode):
    """Bytes that the operators of an eager run read and write, each argument once."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            flat = tree_flatten((args, kwargs, out))[0]
            self.bytes += sum(t.nbytes for t in flat if isinstance(t, torch.Tensor))
        return out


def describe(case: Case) -> dict[str, float]:
    """Parameters (M), multiply-adds of one image (G), traffic of an eager forward pass (GiB).

    Traffic is what the operators read and write if nothing stays in a cache: our streamed operator
    counts its arguments and its result alone. Left out where a pass takes long.
    """
    case = replace(case, mode="forward", compiled=False)
    model = make_model(case)
    params = sum(p.numel() for p in model.parameters())
    images = torch.randn(1, 3, *case.size, device=case.device)
    model.eval()  # returns None in some of the libraries' backbones
    start = time.perf_counter()
    macs = flops.analyse(model, images).total()
    found = dict(params_m=params / 1e6, gmacs=macs / 1e9)
    if time.perf_counter() - start < LONG_SECONDS:
        step = make_step(model, case)
        with _Traffic() as traffic:
            step()
        found["traffic_gib"] = traffic.bytes / 2**30
    return found


def _peak_mib(case: Case) -> float:
    model = make_model(case)
    small = make_step(model, case.small())
    small()
    small()
    del small
    step = make_step(model, case)
    if case.compiled:
        step()
    return _peak_resident_mib(step)


def _figures(
    case: Case, describing: bool, peak_mib: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """The peak, then what ``describe`` finds; an ``error`` is the last."""
    try:
        yield dict(peak_mib=peak_mib())
    except Exception as error:
        yield dict(error=f"memory not measured: {reason(error)}")
        return
    if describing:
        try:
            yield describe(case)
        except Exception as error:
            yield dict(error=f"operations not counted: {reason(error)}")


def _child(case: Case, describing: bool, threads: int, connection: Connection) -> None:
    """Run in a fresh process: send the figures."""
    quiet()
    torch.set_num_threads(threads)
    for found in _figures(case, describing, partial(_peak_mib, case)):
        connection.send(found)


def measure_on_gpu(case: Case, model: nn.Module, describing: bool) -> dict[str, Any]:
    """As :meth:`PeakMeter.measure`, in this process: torch counts what it allocates on a GPU."""
    found: dict[str, Any] = {}
    for figures in _figures(case, describing, lambda: _peak_cuda_mib(make_step(model, case))):
        found |= figures
    return found


class PeakMeter:
    """Measures peak memory, each case in a separate process.

    The processes are forked from one that has imported the libraries and run nothing.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.context = multiprocessing.get_context("forkserver")
        names = [name for name in PRELOAD if importlib.util.find_spec(name.partition(".")[0])]
        self.context.set_forkserver_preload(names)

    def measure(self, case: Case, describing: bool) -> dict[str, Any]:
        """Peak memory above the process that holds the model and the data.

        Returns ``peak_mib``, if ``describing`` what :func:`describe` gives, and ``error`` if
        something failed.
        """
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_child,
            args=(case, describing, self.threads, sender),
            daemon=not case.compiled,  # the compiler starts child processes
        )
        process.start()
        sender.close()
        found: dict[str, Any] = {}
        try:
            for _ in range(1 + describing):
                found.update(receiver.recv())
                if "error" in found:
                    break
        except EOFError:
            process.join()
            found["error"] = f"the measuring process ended with {process.exitcode} (-9: no memory)"
        process.join()
        return found


# -------------------------------------------------------------------------------------- the machine


def device_name(device: str) -> str:
    """The processor's or card's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        processors = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*: (.*)", processors, re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def commit() -> str | None:
    """The commit that the package was checked out at, with ``-dirty``; None if it was not."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def versions() -> dict[str, str]:
    """Versions of the packages involved."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    names = "mmsoft mmengine mmcv mmdet mmsegmentation mmpretrain triton"
    for name in [*names.split(), "linformer", "performer-pytorch", "nystrom-attention"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _product_tflops(side: int, device: str, dtype: str) -> float:
    a = torch.randn(side, side, device=device, dtype=DTYPES[dtype])
    with precision(dtype):
        seconds = min(seconds_of(partial(torch.matmul, a, a), 1, device) for _ in range(6))
    return 2 * side**3 / seconds / 1e12


def ceilings(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """Limits of the device: TFLOP/s of a square matrix product, GB/s of a copy."""
    side, elements = (8192, 1 << 28) if device == "cuda" else (2048, 1 << 26)
    found = {}
    for dtype in dtypes:
        found[f"{dtype}_tflops"] = tflops = _product_tflops(side // 8, device, dtype)
        if tflops > EMULATED:  # else the large one would take minutes, and tell no more
            found[f"{dtype}_tflops"] = _product_tflops(side, device, dtype)
    source = torch.zeros(elements, device=device)
    target = torch.zeros_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), 1, device) for _ in range(6))
    found["copy_gb_s"] = 2 * source.nbytes / seconds / 1e9
    return found
