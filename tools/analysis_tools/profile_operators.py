#!/usr/bin/env python
"""Print where the time of a config's backbone goes, operator by operator or by cause.

    python tools/analysis_tools/profile_operators.py CONFIG --shape 800 1344
    python tools/analysis_tools/profile_operators.py CONFIG --shape 800 1344 --causes

A forward pass on a random image without gradients, after two to warm up, by torch's profiler. Times
are of the operators alone, without those that they call; on a GPU those of its kernels. With
`--causes`, all between queries and the attention term of our layers is attention, other operators
go by their names, and matrix products of linear layers and convolutions stand beside the time that
they would take at the speed of the best matrix product of the device, which is measured first; and
on a CPU what a warm pass takes of the system, which clears memory before it hands it out: page by
page, each a fault.
"""

import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from mmengine.config import Config
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from mmsoft import flops
from mmsoft.benchmark.measure import ceilings, seconds_of
from mmsoft.builder import add_shape, build_model, config_parser, read_config
from mmsoft.models.attention import SoftmaxFreeAttention

Row = tuple[str, int, float]  # an operator's name, its calls, its milliseconds
LINEAR, CONVOLUTIONS = "matrix products of linear layers", "convolutions"
WITHIN = "attention of "  # begins the names of operators between queries and attention term
# By what is in an operator's name, the first that fits; what fits none are small ones and calls.
CAUSES = {
    "attention: kernels, softmax, landmarks": (WITHIN, "mmsoft::", "scaled_dot_product"),
    LINEAR: ("addmm", "linear_pointwise"),  # the latter with GELU in it
    CONVOLUTIONS: ("conv2d", "convolution"),
    "normalization": ("norm",),
    "element-wise: GELU, residual connections": (
        *("sigmoid", "gelu", "relu", "add", "mul", "div", "sub", "clamp", "sqrt", "square"),
    ),
    "copies and changes of layout": ("copy", "clone", "cat", "pad", "index", "fill"),
}
REST = "small operators, views and calls"
NAMED = {"mm": LINEAR, "linear": LINEAR, "matmul": REST}
# As MMEngine's analysis names them.
COUNTED = {LINEAR: ("linear", "addmm"), CONVOLUTIONS: ("conv",)}


def cause(name: str) -> str:
    """What an operator's time is spent on."""
    fits = (words for words, parts in CAUSES.items() if any(part in name for part in parts))
    return NAMED.get(name) or next(fits, REST)


def built(
    config: Config, shape: tuple[int, int], batch: int, device: str
) -> tuple[nn.Module, Tensor]:
    """The backbone, and images for it."""
    model = build_model(config, "backbone").to(device)
    model.eval()  # which returns nothing in some of mmdet's backbones
    return model, torch.rand(batch, 3, *shape, device=device)


@contextmanager
def marked() -> Iterator[None]:
    """Give the profiler a name for what our attention layers do with queries and values."""

    def recorded(method: Callable) -> Callable:
        @wraps(method)
        def call(*arguments: Any) -> Any:
            with record_function(WITHIN):
                return method(*arguments)

        return call

    kept = {name: getattr(SoftmaxFreeAttention, name) for name in ("attend", "gather", "read")}
    for name, method in kept.items():
        setattr(SoftmaxFreeAttention, name, recorded(method))
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(SoftmaxFreeAttention, name, method)


def within(event: Any) -> bool:
    """Whether one of our attention layers called an operator."""
    while event is not None:
        if event.name == WITHIN:
            return True
        event = event.cpu_parent
    return False


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, *, mark: bool = False) -> list[Row]:
    """The operators of the backbone, the slowest first; ``mark`` those ``WITHIN`` attention."""
    activities = [ProfilerActivity.CPU]
    if on_gpu := images.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):
        model(images)
    with marked(), profile(activities=activities) as found:
        model(images)
    spent = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    calls: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in found.events():
        if spent(event) > 0:
            name = event.name.removeprefix("aten::")
            name = WITHIN + name if mark and within(event) else name
            calls[name] += 1
            times[name] += spent(event) / 1e3
    return [(name, calls[name], ms) for name, ms in times.most_common()]


@torch.no_grad()
def least_ms(model: nn.Module, images: Tensor) -> float:
    """Of five passes without the profiler."""
    device = images.device.type
    return 1e3 * min(seconds_of(lambda: model(images), 1, device) for _ in range(5))


@torch.no_grad()
def of_the_system(model: nn.Module, images: Tensor) -> tuple[float, float, int]:
    """Of a pass: ms of processor time, ms of it in the system, and page faults."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    model(images)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = 1e3 * (after.ru_stime - before.ru_stime)
    user = 1e3 * (after.ru_utime - before.ru_utime)
    return user + system, system, after.ru_minflt - before.ru_minflt


def by_cause(rows: list[Row], macs: Mapping[str, float], tflops: float) -> list[list[Any]]:
    """Milliseconds and share of each cause; of products, multiply-adds, time and speed at best.

    Args:
        rows: what :func:`measure` found.
        macs: multiply-adds of all operators as MMEngine's analysis names them.
        tflops: the best matrix product's speed, two FLOPs to a multiply-add.
    """
    spent = dict.fromkeys((*CAUSES, REST), 0.0)
    for name, _, ms in rows:
        spent[cause(name)] += ms
    total, table = sum(spent.values()), []
    for words, ms in spent.items():
        row: list[Any] = [words, ms, f"{ms / total:.1%}", None, None, None]
        if words in COUNTED:
            counted = sum(macs.get(name, 0) for name in COUNTED[words])
            best = 2e3 * counted / (1e12 * tflops)
            row[3:] = [counted / 1e9, best, f"{best / ms:.0%}" if ms else None]
        table.append(row)
    counted = sum(macs.values())
    best = 2e3 * counted / (1e12 * tflops)
    return [*table, ["sum", total, None, counted / 1e9, best, f"{best / total:.0%}"]]


def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    add_shape(parser)
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--top", type=int, default=12, help="rows (default: 12)")
    parser.add_argument(
        "--causes", action="store_true", help="by cause, products beside the device's best"
    )
    args = parser.parse_args()
    if args.batch < 1 or args.top < 1:
        parser.error("--batch and --top take positive numbers")
    model, images = built(read_config(args), args.shape, args.batch, args.device)
    if args.causes:
        tflops = ceilings(images.device.type, ["float32"])["float32_tflops"]
        counts = flops.analyse(model, images[:1]).by_operator()
        macs = {name: args.batch * count for name, count in counts.items()}
        table = by_cause(measure(model, images, mark=True), macs, tflops)
        head = ("cause", "ms", "share", "GMACs", "ms at best", "of best")
        print(tabulate(table, head, "plain", floatfmt=".1f"))
        alone = least_ms(model, images)
        share = 2e3 * sum(macs.values()) / (1e12 * tflops) / alone
        print(f"\n{alone:.1f} ms without the profiler: {share:.1%} of {tflops:.3f} TFLOP/s")
        if images.device.type == "cpu":
            spent, system, faults = of_the_system(model, images)
            print(
                f"{spent:.1f} ms of processor time, {system:.1f} ms of it in the system, with "
                f"{faults} page faults"
            )
        return
    rows = measure(model, images)
    total = sum(ms for _, _, ms in rows)
    kept, rest = rows[: args.top], rows[args.top :]
    if rest:
        kept.append(("the rest", sum(row[1] for row in rest), sum(row[2] for row in rest)))
    lines = [(name, count, ms, f"{ms / total:.1%}") for name, count, ms in kept]
    header = ("operator", "calls", "ms", "share")
    print(tabulate([*lines, ("sum", None, total)], header, "plain", floatfmt=".1f"))


if __name__ == "__main__":
    main()
