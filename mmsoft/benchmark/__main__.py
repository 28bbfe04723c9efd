"""Measure time and memory of the backbones and of their alternatives.

    python -m mmsoft.benchmark --preset cpu --out work_dirs/benchmark
    python -m mmsoft.benchmark --models softpp-tiny pvtv2-b1 --sizes 512 --modes train
    python -m mmsoft.benchmark --write-docs work_dirs/benchmark/benchmark.json
    python -m mmsoft.benchmark plot work_dirs/benchmark/benchmark.json
    python -m mmsoft.benchmark compare main

Prints tables and writes `benchmark.json`, kept current after every group of measurements, and PNG
plots. All models of a group are warmed at the measured shape and then timed in turns. Peak memory
is that of a fresh process, above what it is with the model and its input loaded. `--write-docs`
makes `benchmarks.md` and its plots from such files, `plot` the papers' figures alone. `compare`
tells in two minutes what the working tree made slower than a commit, and fails if anything got
slower or the machine is too noisy to tell.
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

from mmsoft.benchmark.cases import (
    BACKBONES,
    CHANNELS_LAST,
    DETECTORS,
    DTYPES,
    LANDMARKS,
    MODES,
    OPERATORS,
    RUNTIMES,
    SEQUENCES,
    TRITON,
    UNBOUNDED,
    WHOLE,
    Case,
    runtime_label,
)

COMPILED = {"also": (False, True), "only": (True,)}  # with --compile
Size = tuple[int, int]
Group = tuple[str, list[Case]]  # section of the JSON, and what is timed in turns
SCALING_MODELS = ("softpp-tiny", "softpp-small")
# Values of the options of the sections if they are given without any, or by a preset.
DEFAULTS: dict[str, list] = dict(
    scaling=[(1024, 1024), (2048, 2048), (4096, 4096)],
    operator=[32, 64, 128, 192],
    sequence=[512, 1024, 2048, 4096, 8192, 16384],
    whole=[(800, 1344), (512, 512), (512, 2048)],
    onnx=[(224, 224), (800, 1344)],
)
# What a preset measures besides backbones; a CPU has no time for the rest in the same run.
PRESET_SECTIONS = {
    "cpu": ("scaling", "whole"),
    "cuda": ("scaling", "operator", "sequence", "whole"),
}
USUAL = [n for n in BACKBONES if n not in LANDMARKS and not n.endswith((UNBOUNDED, TRITON))]
NEWER = ("van-b1", "davit-tiny")
TRAINED = [
    name
    for name in USUAL
    if BACKBONES[name].ours in SCALING_MODELS
    and name.removesuffix(CHANNELS_LAST) not in (*NEWER, "softpp-tiny-newton")
]
IN_BFLOAT16 = [*SCALING_MODELS, "swin-tiny", "convnext-tiny", "resnet-50"]
IN_BFLOAT16 += [n + CHANNELS_LAST for n in IN_BFLOAT16[2:]]
# (size, batch, mode, names by dtype) of the backbones, those of a row timed in turns.
Row = tuple[Size, int, str, dict[str, list[str]]]
PRESETS: dict[str, list[Row]] = {
    "cpu": [
        ((224, 224), 1, "forward", {"float32": USUAL}),
        ((512, 512), 1, "forward", {"float32": USUAL}),
        ((800, 1344), 1, "forward", {"float32": [*USUAL, *LANDMARKS], "bfloat16": IN_BFLOAT16}),
        ((512, 512), 2, "train", {"float32": TRAINED}),
    ],
    "cuda": [
        (size, batch, mode, {dtype: USUAL})
        for size, batch in (((224, 224), 128), ((512, 512), 16), ((800, 1344), 2))
        for mode in MODES
        for dtype in ("float32", "tf32", "bfloat16")
    ],
}
# The release trains through the unrolled iteration, which stores every step: nothing to compare.
FORWARD_ONLY = {"released-tiny"}


def parse_size(text: str) -> Size:
    """`512` or `800x1344`, height first."""
    try:
        numbers = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 32:
        raise argparse.ArgumentTypeError(
            f"invalid size {text!r}: give a side or HEIGHTxWIDTH in pixels, at least 32, "
            "for example 224, 512 or 800x1344"
        )
    return numbers[0], numbers[-1]


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m mmsoft.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    worth = "what is worth measuring on such a device; on a CPU but for --operator, --sequence and "
    worth += "--onnx, a second command"
    p.add_argument("--preset", choices=PRESETS, help=worth)
    rest = " ".join(name for name in BACKBONES if name not in USUAL)
    names = f"backbones (default, all but the last {len(rest.split())}): {' '.join(USUAL)} {rest}"
    p.add_argument("--models", nargs="+", metavar="NAME", help=names)
    p.add_argument(
        "--sizes", nargs="+", type=parse_size, metavar="SIZE", help="of the images (default: 512)"
    )
    batch = "images at a time, one number or one for each of --sizes (default: 1)"
    p.add_argument("--batch", nargs="+", type=positive, help=batch)
    p.add_argument(
        "--modes", nargs="+", choices=MODES, help="train is forward and backward (default: forward)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        help="tf32: TF32 products on a GPU; bfloat16: autocast (default: float32)",
    )
    compiled = "under torch.compile, after everything that is not (or nothing else, with 'only')"
    p.add_argument("--compile", nargs="?", choices=COMPILED, const="also", help=compiled)
    p.add_argument(
        "--scaling",
        nargs="*",
        type=parse_size,
        metavar="SIZE",
        help=f"time per pixel and memory of {' '.join(SCALING_MODELS)} against the size, of the "
        "first also without max_keys (default: 1024 2048 4096)",
    )
    p.add_argument(
        "--operator",
        nargs="*",
        type=positive,
        metavar="SIDE",
        help="attention layers alone on square grids of tokens (default: 32 64 128 192)",
    )
    p.add_argument(
        "--sequence",
        nargs="*",
        type=positive,
        metavar="TOKENS",
        help="small models of sequences of such lengths (default: 512 to 16384, doubling)",
    )
    p.add_argument(
        "--whole",
        nargs="*",
        type=parse_size,
        metavar="SIZE",
        help="test loops of RetinaNet and Mask R-CNN at the first size, of UperNet at the "
        "others (default: 800x1344 512 512x2048)",
    )
    p.add_argument(
        "--onnx",
        nargs="*",
        type=parse_size,
        metavar="SIZE",
        help=f"{' '.join(SCALING_MODELS)} in onnxruntime beside torch, on a CPU "
        "(default: 224 800x1344)",
    )
    p.add_argument("--repeats", type=positive, default=11, help="samples of each (default: 11)")
    slow = "samples of images above 1024x1024, of whole models and of what takes more than 4 s "
    slow += "(default: 3)"
    p.add_argument("--slow-repeats", type=positive, default=3, help=slow)
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
    command = p.add_subparsers(title="instead of measuring", metavar="")
    figures = command.add_parser("plot", help="draw memory.png and tradeoff.png from a JSON")
    figures.add_argument("json", type=Path, help="written by this program")
    figures.add_argument("--out-dir", type=Path, default=Path(), help="default: this folder")
    other = command.add_parser("compare", help="the working tree with a commit, in turns")
    other.add_argument("commit")
    other.add_argument("--rounds", type=positive, default=15, help="of all cases (default: 15)")
    return p


def backbone_rows(args: argparse.Namespace) -> list[Row]:
    """What to measure of the backbones: the preset's, with the arguments in place of its own."""
    rows = PRESETS.get(args.preset, [])
    if not rows and (args.models or all(getattr(args, name) is None for name in DEFAULTS)):
        sizes, batches = args.sizes or [(512, 512)], args.batch or [1]
        if len(batches) == 1:
            batches = batches * len(sizes)
        modes, dtypes = args.modes or ["forward"], args.dtypes or ["float32"]
        grid = itertools.product(zip(sizes, batches), modes, dtypes)
        rows = [(size, batch, mode, {dtype: USUAL}) for (size, batch), mode, dtype in grid]
    elif args.dtypes:
        found = [
            (size, batch, mode, {dtype: next(iter(names.values()))})
            for size, batch, mode, names in rows
            for dtype in args.dtypes
        ]
        rows = [row for i, row in enumerate(found) if row not in found[:i]]
    chosen: list[Row] = []
    for size, batch, mode, by_dtype in rows:
        usable = {
            dtype: [n for n in args.models or names if mode == "forward" or n not in FORWARD_ONLY]
            for dtype, names in by_dtype.items()
        }
        chosen.append((size, batch, mode, usable))
    return chosen


def plan(args: argparse.Namespace) -> list[Group]:
    """The groups of cases to measure, in order; each group's cases are timed in turns."""
    device = args.device or args.preset or "cpu"
    sections = {name: getattr(args, name) for name in DEFAULTS}
    for name, given in sections.items():
        if given == [] or (given is None and name in PRESET_SECTIONS.get(args.preset, ())):
            sections[name] = DEFAULTS[name]
    preset = dict.fromkeys(next(iter(names)) for *_, names in PRESETS.get(args.preset, []))
    dtypes = args.dtypes or [*preset] or ["float32"]
    plain = dict(device=device, dtype=dtypes[0])

    groups: list[Group] = []
    for compiled, (size, batch, mode, by_dtype) in itertools.product(
        COMPILED.get(args.compile, (False,)), backbone_rows(args)
    ):
        cases = [
            Case("backbone", n, size, batch, mode, device=device, dtype=dtype, compiled=compiled)
            for dtype, names in by_dtype.items()
            for n in names
        ]
        groups.append(("results", cases))
    for size in sections["scaling"] or []:
        names = [*SCALING_MODELS, SCALING_MODELS[0] + UNBOUNDED]
        groups.append(("scaling", [Case("backbone", n, size, **plain) for n in names]))
    for side, mode in itertools.product(sections["operator"] or [], MODES):
        cases = [Case("operator", n, (side, side), mode=mode, **plain) for n in OPERATORS]
        groups.append(("operator", cases))
    for tokens, mode in itertools.product(sections["sequence"] or [], MODES):
        cases = [Case("sequence", n, (1, tokens), mode=mode, **plain) for n in SEQUENCES]
        groups.append(("sequence", cases))
    if whole := sections["whole"]:
        for task in dict.fromkeys(model.task for model in WHOLE.values()):
            names = [name for name, model in WHOLE.items() if model.task == task]
            sizes = whole[:1] if task in DETECTORS else whole[1:] or whole
            for size, dtype in itertools.product(sizes, dtypes):
                cases = [Case("whole", n, size, device=device, dtype=dtype) for n in names]
                groups.append(("whole", cases))
    for size in (sections["onnx"] or []) if device == "cpu" else []:
        pairs = itertools.product(SCALING_MODELS, RUNTIMES)
        groups.append(("onnx", [Case("onnx", n, size, runtime=runtime) for n, runtime in pairs]))
    return [group for group in groups if group[1]]


def entry(section: str, case: Case, figures: dict[str, Any]) -> dict[str, Any]:
    """A case and its figures as an entry of the JSON."""
    what: dict[str, Any]
    if section in ("operator", "sequence"):
        tokens = case.size[0] * case.size[1]
        label = (OPERATORS if section == "operator" else SEQUENCES)[case.name][0]
        what = dict(name=case.name, label=label, tokens=tokens)
    elif section == "whole":
        whole = WHOLE[case.name]
        what = dict(task=whole.task, backbone=whole.backbone, size=list(case.size))
    else:
        what = dict(backbone=case.name, size=list(case.size))
        if section == "onnx":
            what["runtime"] = runtime_label(case.runtime)
    kind = {key: getattr(case, key) for key in ("batch", "mode", "device", "dtype", "compiled")}
    if "tokens" not in what:
        figures = figures | dict(images_per_second=1e3 * case.batch / figures["median_ms"])
    return what | kind | figures


def title(section: str, cases: list[Case]) -> str:
    """A group in words."""
    case = cases[0]
    words = [section, f"{case.size[0]}x{case.size[1]}", f"batch {case.batch}", case.mode]
    words += [case.device, " and ".join(dict.fromkeys(case.dtype for case in cases))]
    return ", ".join(words + ["compiled"] * case.compiled)


def log(line: str) -> None:
    """Print a line of progress."""
    print(f"   {datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def run(args: argparse.Namespace, data: dict[str, Any], groups: list[Group]) -> None:
    """Measure the groups; `data` and its file are current after each."""
    from mmsoft.benchmark.measure import (
        PeakMeter,
        ceilings,
        measure_on_gpu,
        measure_times,
        model_key,
        quiet,
    )
    from mmsoft.benchmark.plots import plot
    from mmsoft.benchmark.report import print_group, write_json

    quiet()
    torch.set_num_threads(args.threads)
    device = groups[0][1][0].device
    dtypes = sorted({case.dtype for _, cases in groups for case in cases})
    data["ceilings"] = ceilings(device, dtypes)
    meter = PeakMeter(args.threads)
    models: dict[Any, Any] = {}
    described: dict[Any, dict[str, float]] = {}
    for number, (section, cases) in enumerate(groups, 1):
        print(f"\n== {number}/{len(groups)} {title(section, cases)}", flush=True)
        if section in ("operator", "sequence", "whole", "onnx"):
            models.clear()
        times, skipped = measure_times(cases, models, args.repeats, args.slow_repeats, log)
        if section == "results":  # the machine may have been slower when it was measured before
            for name, value in ceilings(device, dtypes).items():
                data["ceilings"][name] = max(value, data["ceilings"][name])
        if device == "cuda":
            torch.cuda.empty_cache()
        entries = []
        for case in times:
            # The memory format, kernels and the dtype change neither parameters nor multiply-adds.
            name = case.name.removesuffix(CHANNELS_LAST).removesuffix(TRITON)
            known = described.setdefault((case.section, name, case.size), {})
            describing = section == "results" and not known
            if device == "cuda":
                found = measure_on_gpu(case, models[model_key(case)], describing)
            else:
                found = {} if section == "onnx" else meter.measure(case, describing)
            if "peak_mib" in found:
                log(f"{case.name}: peak {found['peak_mib']:.0f} MiB")
            if "error" in found:
                log(f"{case.name}: {found['error']}")
            known.update((key, found[key]) for key in ("params_m", "gmacs") if key in found)
            figures = dict(times[case], peak_mib=found.get("peak_mib"), **known)
            if case.mode == "forward" and not case.compiled and "traffic_gib" in found:
                figures["traffic_gib"] = found["traffic_gib"]
            entries.append(entry(section, case, figures))
        data["skipped"] += [
            dict(section=section, name=case.name, size=list(case.size), mode=case.mode, reason=why)
            for case, why in skipped.items()
        ]
        data[section] += entries
        write_json(data, args.out / "benchmark.json")
        print_group(entries)
    plot(data, args.out)


def measure(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Measure what the arguments ask for."""
    from mmsoft.benchmark.measure import commit, device_name, versions
    from mmsoft.benchmark.report import SECTIONS

    if unknown := [name for name in args.models or [] if name not in BACKBONES]:
        p.error(f"--models has no {', '.join(unknown)}; choose from {' '.join(BACKBONES)}")
    if args.preset and (args.sizes or args.batch or args.modes):
        p.error("--preset sets --sizes, --batch and --modes: leave these out, or the preset")
    sizes = len(args.sizes or [()])
    if args.batch and len(args.batch) not in (1, sizes):
        p.error(f"--batch takes one number, or one for each of the {sizes} of --sizes")
    groups = plan(args)
    if not groups:
        p.error(f"nothing to measure: {' '.join(args.models)} has no mode but forward here")
    device = groups[0][1][0].device
    if device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device; use --device cpu")
    args.out = args.out or Path("work_dirs/benchmark")
    data: dict[str, Any] = {
        "device": device_name(device),
        "threads": args.threads,
        "versions": versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"{p.prog} {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "repeats": args.repeats,
        "landmarks": "by content",
        **{section: [] for section in (*SECTIONS, "skipped")},
    }
    run(args, data, groups)
    print(f"\nresults in {args.out}")


def draw(path: Path, folder: Path) -> None:
    """Draw the papers' figures, and name the backbones that are not in them."""
    from mmsoft.benchmark.plots import forward_passes, plot_as_papers, published
    from mmsoft.benchmark.report import read_json

    data = read_json(path)
    written = plot_as_papers(data, folder)
    if not written:
        raise ValueError(
            f"{path} has neither operators with a peak_mib nor forward passes of backbones with a "
            "published accuracy"
        )
    if unknown := {entry["backbone"] for entry in forward_passes(data)} - set(published()):
        names = ", ".join(sorted(unknown))
        print(f"not drawn, no published accuracy known: {names}", file=sys.stderr)
    print(*written.values(), sep="\n")


def main() -> None:
    """Run the command line; an error that the user can fix is one line."""
    p = parser()
    args = p.parse_args()
    try:
        if "commit" in args:
            from mmsoft.benchmark.compare import compare

            p.exit(not compare(args.commit, args.rounds, args.threads))
        elif "json" in args:
            draw(args.json, args.out_dir)
        elif args.write_docs:
            from mmsoft.benchmark.page import write_docs
            from mmsoft.benchmark.report import read_json

            write_docs([read_json(path) for path in args.write_docs], args.out or Path("docs"))
    except (ImportError, OSError, ValueError) as error:
        p.exit(2, f"{p.prog}: {error}\n")
    if "json" not in args and not args.write_docs:
        measure(p, args)


if __name__ == "__main__":
    main()
