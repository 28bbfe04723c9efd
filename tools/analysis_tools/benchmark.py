#!/usr/bin/env python
"""Measure time and memory of the backbones beside what users would pick instead.

    python tools/analysis_tools/benchmark.py --preset cpu --out work_dirs/benchmark
    python tools/analysis_tools/benchmark.py --models softpp-tiny pvtv2-b1 --sizes 512 --modes train
    python tools/analysis_tools/benchmark.py --write-docs work_dirs/benchmark/benchmark.json

Prints tables and writes `benchmark.json`, kept current after every group of measurements, and PNG
plots. All models of a group are warmed at the measured shape and then timed in turns. Peak memory
is that of a fresh process, above what it is with the model and its input loaded. `--write-docs`
makes `benchmarks.md` and its plots from such files.
"""

import argparse
import datetime
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_models import BACKBONES, DTYPES, MODES, OPERATORS, WHOLE, Case

SCALING_SIZES = ("1024", "2048", "4096")
SCALING_MODELS = ("softpp-tiny", "softpp-small")
OPERATOR_SIDES = (32, 64, 128, 256)
WHOLE_SIZES = ("800x1344", "512x512")
# (size, batch, mode) of the backbones.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        device="cpu",
        dtypes=["float32"],
        cases=[
            ("224", 1, "forward"),
            ("512", 1, "forward"),
            ("800x1344", 1, "forward"),
            ("512", 2, "train"),
        ],
        scaling=SCALING_SIZES,
        operator=OPERATOR_SIDES,
        whole=WHOLE_SIZES,
    ),
    "cuda": dict(
        device="cuda",
        dtypes=["float32", "bfloat16"],
        cases=[
            (size, batch, mode)
            for size, batch in (("224", 128), ("512", 16), ("800x1344", 2))
            for mode in MODES
        ],
        scaling=SCALING_SIZES,
        operator=OPERATOR_SIDES,
        whole=WHOLE_SIZES,
    ),
}
# The release trains through the unrolled iteration, which stores every step: nothing to compare.
FORWARD_ONLY = {"released-tiny"}


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `800x1344`, height first."""
    try:
        numbers = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 32:
        raise argparse.ArgumentTypeError(
            f"size {text!r} is none: give a side or HEIGHTxWIDTH in pixels, at least 32, "
            "for example 224, 512 or 800x1344"
        )
    return numbers[0], numbers[-1]


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", choices=PRESETS, help="everything worth measuring on such a device")
    p.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"backbones (default: all): {' '.join(BACKBONES)}",
    )
    p.add_argument(
        "--sizes", nargs="+", type=parse_size, metavar="SIZE", help="of the images (default: 512)"
    )
    p.add_argument("--batch", type=positive, help="images at a time (default: 1)")
    p.add_argument(
        "--modes", nargs="+", choices=MODES, help="train is forward and backward (default: forward)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="bfloat16 is by autocast (default: float32)"
    )
    p.add_argument("--compile", action="store_true", help="also under torch.compile")
    p.add_argument(
        "--scaling",
        nargs="*",
        type=parse_size,
        metavar="SIZE",
        help=f"time per pixel and memory of {' '.join(SCALING_MODELS)} against the size "
        f"(default: {' '.join(SCALING_SIZES)})",
    )
    p.add_argument(
        "--operator",
        nargs="*",
        type=positive,
        metavar="SIDE",
        help="attention layers alone on square grids of tokens "
        f"(default: {' '.join(map(str, OPERATOR_SIDES))})",
    )
    p.add_argument(
        "--whole",
        nargs="*",
        type=parse_size,
        metavar="SIZE",
        help="test loops of RetinaNet and UperNet at these two sizes "
        f"(default: {' '.join(WHOLE_SIZES)})",
    )
    p.add_argument("--repeats", type=positive, default=11, help="samples of each (default: 11)")
    p.add_argument(
        "--slow-repeats",
        type=positive,
        default=3,
        help="samples of what takes more than 10 s a call (default: 3)",
    )
    p.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    p.add_argument("--out", type=Path, help="folder of the results (default: work_dirs/benchmark)")
    p.add_argument(
        "--write-docs",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="measure nothing; write benchmarks.md from these files into --out (default: docs); of "
        "the same device, groups of a later file replace those of an earlier one",
    )
    return p


def plan(args: argparse.Namespace) -> list[tuple[str, list[Case]]]:
    """The groups of cases to measure, in order; each group's cases are timed in turns."""
    preset = PRESETS.get(args.preset, {})
    device = args.device or preset.get("device", "cpu")
    names = args.models or list(BACKBONES)
    sections = ("scaling", "operator", "whole")
    for name in sections:
        if getattr(args, name) == [] or (getattr(args, name) is None and name in preset):
            default = dict(scaling=SCALING_SIZES, operator=OPERATOR_SIDES, whole=WHOLE_SIZES)[name]
            setattr(args, name, [parse_size(v) if isinstance(v, str) else v for v in default])
    if preset:
        backbones = [(parse_size(size), batch, mode) for size, batch, mode in preset["cases"]]
    elif args.models or all(getattr(args, name) is None for name in sections):
        sizes, modes = args.sizes or [(512, 512)], args.modes or ["forward"]
        backbones = [(size, args.batch or 1, mode) for size in sizes for mode in modes]
    else:
        backbones = []
    kinds = list(
        itertools.product(
            args.dtypes or preset.get("dtypes", ["float32"]), (False, True)[: 1 + args.compile]
        )
    )

    def kind(dtype: str, compiled: bool) -> dict[str, Any]:
        return dict(device=device, dtype=dtype, compiled=compiled)

    groups: list[tuple[str, list[Case]]] = []
    for (size, batch, mode), variant in itertools.product(backbones, kinds):
        cases = [
            Case("backbone", name, size, batch, mode, **kind(*variant))
            for name in names
            if mode == "forward" or name not in FORWARD_ONLY
        ]
        groups.append(("results", cases))
    first = kind(kinds[0][0], False)
    for size in args.scaling or []:
        groups.append(("scaling", [Case("backbone", n, size, **first) for n in SCALING_MODELS]))
    for side, mode in itertools.product(args.operator or [], MODES):
        cases = [Case("operator", name, (side, side), mode=mode, **first) for name in OPERATORS]
        groups.append(("operator", cases))
    if args.whole:
        sizes = dict(zip(("RetinaNet", "UperNet"), (args.whole[0], args.whole[-1])))
        for (task, size), variant in itertools.product(sizes.items(), kinds):
            if not variant[1]:
                found = [name for name, whole in WHOLE.items() if whole.task == task]
                cases = [Case("whole", name, size, **kind(*variant)) for name in found]
                groups.append(("whole", cases))
    return groups


def entry(section: str, case: Case, figures: dict[str, Any]) -> dict[str, Any]:
    """A case and its figures as they stand in the JSON."""
    common = dict(
        batch=case.batch,
        mode=case.mode,
        device=case.device,
        dtype=case.dtype,
        compiled=case.compiled,
        **figures,
    )
    if section == "operator":
        return (
            dict(name=case.name, label=OPERATORS[case.name][0], tokens=case.size[0] * case.size[1])
            | common
        )
    common["images_per_second"] = 1e3 * case.batch / figures["median_ms"]
    if section == "whole":
        whole = WHOLE[case.name]
        return dict(task=whole.task, backbone=whole.backbone, size=list(case.size)) | common
    return dict(backbone=case.name, size=list(case.size)) | common


def title(section: str, case: Case) -> str:
    """A group in words."""
    words = [section, f"{case.size[0]}x{case.size[1]}", f"batch {case.batch}", case.mode]
    return ", ".join([*words, case.device, case.dtype, *["compiled"] * case.compiled])


def run(
    args: argparse.Namespace, data: dict[str, Any], groups: list[tuple[str, list[Case]]]
) -> None:
    """Measure the groups; `data` and its file are current after each."""
    from benchmark_measure import PeakMeter, ceilings, measure_times, quiet
    from benchmark_report import plot, print_group, write_json

    quiet()
    torch.set_num_threads(args.threads)
    device = groups[0][1][0].device
    data["ceilings"] = ceilings(
        device, sorted({case.dtype for _, cases in groups for case in cases})
    )
    meter, models, described = PeakMeter(args.threads), {}, {}
    for number, (section, cases) in enumerate(groups, 1):
        print(f"\n== {number}/{len(groups)} {title(section, cases[0])}", flush=True)

        def log(line: str) -> None:
            print(f"   {datetime.datetime.now():%H:%M:%S} {line}", flush=True)

        if section in ("operator", "whole"):
            models.clear()
        times, skipped = measure_times(cases, models, args.repeats, args.slow_repeats, log)
        if device == "cuda":
            torch.cuda.empty_cache()
        entries = []
        for case in times:
            known = described.setdefault((case.section, case.name, case.size), {})
            eager = section == "results" and case.mode == "forward" and not case.compiled
            found = meter.measure(case, describing=eager or (section == "results" and not known))
            if "peak_mib" in found:
                log(f"{case.name}: peak {found['peak_mib']:.0f} MiB")
            if "error" in found:
                log(f"{case.name}: {found['error']}")
            known.update((key, found[key]) for key in ("params_m", "gmacs") if key in found)
            figures = dict(times[case], peak_mib=found.get("peak_mib"), **known)
            if eager and "traffic_gib" in found:
                figures["traffic_gib"] = found["traffic_gib"]
            entries.append(entry(section, case, figures))
        data["skipped"] += [
            dict(section=section, name=case.name, size=list(case.size), mode=case.mode, reason=why)
            for case, why in skipped.items()
        ]
        data[section] += entries
        write_json(data, args.out / "benchmark.json")
        print_group(section, entries)
    plot(data, args.out)


def main() -> None:
    """Run the command line."""
    p = parser()
    args = p.parse_args()
    if unknown := [name for name in args.models or [] if name not in BACKBONES]:
        p.error(f"--models has no {', '.join(unknown)}; choose from {' '.join(BACKBONES)}")
    if args.write_docs:
        from benchmark_report import read_json, write_docs

        try:
            write_docs([read_json(path) for path in args.write_docs], args.out or Path("docs"))
        except (OSError, ValueError) as error:
            p.error(f"--write-docs: {error}")
        return
    if args.preset and (args.sizes or args.batch or args.modes):
        p.error("--preset sets --sizes, --batch and --modes: leave these out, or the preset")
    if args.whole and len(args.whole) > 2:
        p.error("--whole takes the size for RetinaNet and that for UperNet")
    groups = plan(args)
    if groups[0][1][0].device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device; use --device cpu")
    args.out = args.out or Path("work_dirs/benchmark")
    args.out.mkdir(parents=True, exist_ok=True)
    from benchmark_measure import device_name, versions

    data: dict[str, Any] = {
        "device": device_name(groups[0][1][0].device),
        "threads": args.threads,
        "versions": versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python tools/analysis_tools/benchmark.py {shlex.join(sys.argv[1:])}",
        "repeats": args.repeats,
        **{section: [] for section in ("results", "scaling", "whole", "operator", "skipped")},
    }
    run(args, data, groups)
    print(f"\nresults in {args.out}")


if __name__ == "__main__":
    main()
