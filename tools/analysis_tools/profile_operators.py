#!/usr/bin/env python
"""Print where the time of a config's backbone goes, operator by operator.

    python tools/analysis_tools/profile_operators.py CONFIG --shape 800 1344

A forward pass on a random image without gradients, after two to warm up, by torch's profiler. Times
are of the operators alone, without those that they call; on a GPU those of its kernels.
"""

from operator import attrgetter

import torch
from mmengine.config import Config
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from mmsoft.builder import add_shape, build_model, config_parser, read_config


def measure(
    config: Config, shape: tuple[int, int], batch: int, device: str
) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of each operator of the backbone, the slowest first."""
    model = build_model(config, "backbone").to(device)
    model.eval()  # which returns nothing in some of mmdet's backbones
    images = torch.rand(batch, 3, *shape, device=device)
    activities = [ProfilerActivity.CPU]
    if on_gpu := images.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with torch.no_grad():
        for _ in range(2):
            model(images)
        with profile(activities=activities) as found:
            model(images)
    time = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    events = sorted((event for event in found.key_averages() if time(event) > 0), key=time)
    return [(e.key.removeprefix("aten::"), e.count, time(e) / 1e3) for e in reversed(events)]


def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    add_shape(parser)
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--top", type=int, default=12, help="rows (default: 12)")
    args = parser.parse_args()
    if args.batch < 1 or args.top < 1:
        parser.error("--batch and --top take positive numbers")
    rows = measure(read_config(args), args.shape, args.batch, args.device)
    total = sum(time for _, _, time in rows)
    kept, rest = rows[: args.top], rows[args.top :]
    if rest:
        kept.append(("the rest", sum(row[1] for row in rest), sum(row[2] for row in rest)))
    table = [(name, count, time, f"{time / total:.1%}") for name, count, time in kept]
    header = ("operator", "calls", "ms", "share")
    print(tabulate([*table, ("sum", None, total)], header, "plain", floatfmt=".1f"))


if __name__ == "__main__":
    main()
