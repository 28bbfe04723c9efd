"""The generated page, ``benchmarks.md``: targets, tables, plots."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmsoft.benchmark.cases import (
    BACKBONES,
    CHANNELS_LAST,
    LANDMARKS,
    SEQUENCES,
    TRITON,
    UNBOUNDED,
)
from mmsoft.benchmark.plots import plot
from mmsoft.benchmark.report import (
    MATRICES,
    PRODUCTS,
    Entry,
    against_peers,
    at_best,
    divide,
    kernel_table,
    label_of,
    landmarks_of,
    markdown,
    merge,
    number,
    of_kind,
    rates,
    size_of,
    table,
)
from mmsoft.fileio import write_whole

Pair = tuple[float | None, float | None]  # a ratio of minima, and of medians


@dataclass
class Target:
    """A claim about one run: ``measured`` is at least, or at most, ``bound``; or a plain ratio."""

    claim: str
    measured: float | None
    bound: float | None
    at_most: bool = False
    medians: float | None = None  # the same ratio of medians

    @property
    def met(self) -> bool | None:
        """None where nothing was measured, or nothing is wanted."""
        if self.measured is None or self.bound is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


LARGE, MIDDLE, SMALL = (800, 1344), (512, 512), (224, 224)
TINY = "softpp-tiny"
OURS_SMALL = "softpp-small"
# Size, ours, peer, and how many times as fast ours is to be; None: only how many times it is.
SPEEDS: tuple[tuple[tuple[int, int], str, str, float | None], ...] = (
    (LARGE, TINY, "pvtv2-b1", 3),
    (LARGE, TINY, "pvt-tiny", 2.3),
    (LARGE, OURS_SMALL, "pvtv2-b2", 3.2),
    (LARGE, OURS_SMALL, "swin-tiny", 1.6),
    (LARGE, OURS_SMALL, "convnext-tiny", 1.3),
    (LARGE, OURS_SMALL, "resnet-50", 1.15),
    (MIDDLE, TINY, "pvtv2-b1", 1),
    (MIDDLE, OURS_SMALL, "pvtv2-b2", 1),
    (MIDDLE, OURS_SMALL, "swin-tiny", 1),
    (SMALL, TINY, "pvt-tiny", 1.15),
    (SMALL, TINY, "pvtv2-b1", 1),
    (SMALL, OURS_SMALL, "pvtv2-b2", 1),
    (SMALL, OURS_SMALL, "convnext-tiny", 1),
    (SMALL, OURS_SMALL, "swin-tiny", 1.1),
    (SMALL, OURS_SMALL, "resnet-50", None),
)
TRAINING = (
    (TINY, "pvtv2-b1", 1.4),
    (OURS_SMALL, "pvtv2-b2", 1),
    (OURS_SMALL, "convnext-tiny", 1.4),
    (OURS_SMALL, "swin-tiny", 1.4),
    (OURS_SMALL, "resnet-50", 0.9),
)
LINEAR = ("linformer", "performer", "nystromformer")
TASKS = (("RetinaNet", LARGE), ("Mask R-CNN", LARGE), ("UperNet", MIDDLE), ("UperNet", (512, 2048)))


class Run:
    """What a run measured on a CPU, uncompiled."""

    def __init__(self, data: dict[str, Any]):
        self.ceilings: dict[str, float] = data.get("ceilings", {})
        self.entries: list[Entry] = [
            entry
            for section in ("results", "scaling", "whole")
            for entry in data[section]
            if entry["device"] == "cpu" and not entry["compiled"]
        ]

    def settings(self, backbone: str, size: tuple[int, int], **where: Any) -> list[Entry]:
        """Its entries, in each memory format; by default of forward passes in float32."""
        where = dict(mode="forward", batch=1, task=None, dtype="float32") | where
        return [
            entry
            for entry in self.entries
            if entry["backbone"] in (backbone, backbone + CHANNELS_LAST)
            and tuple(entry["size"]) == size
            and all(entry.get(key) == wanted for key, wanted in where.items())
        ]

    def least(self, figure: str, backbone: str, size: tuple[int, int], **where: Any) -> Any:
        """The least of a figure over the memory formats; None where nothing was measured."""
        found = (entry[figure] for entry in self.settings(backbone, size, **where))
        return min((value for value in found if value is not None), default=None)

    def faster(self, ours: str, peer: str, size: tuple[int, int], **where: Any) -> Pair:
        """How many times as fast as a peer in its faster memory format."""
        minima, medians = (
            divide(*(self.least(figure, name, size, **where) for name in (peer, ours)))
            for figure in ("min_ms", "median_ms")
        )
        return minima, medians


def _label(backbone: str) -> str:
    return BACKBONES[backbone].label


def gpu_targets(results: Sequence[Entry]) -> list[Target]:
    """Those of backbones on a GPU: ours ahead of its peers, in whatever was measured."""
    kinds: dict[tuple, list[Entry]] = {}
    for entry in results:
        if tuple(entry["size"]) == LARGE:
            kinds.setdefault(of_kind(entry), []).append(entry)
    found = []
    for entries in kinds.values():
        for size, peer in ((TINY, "pvtv2-b1"), (OURS_SMALL, "pvtv2-b2"), (OURS_SMALL, "swin-tiny")):
            for ours in (size, size + TRITON):
                best = [at_best(name, entries) for name in (peer, ours)]
                minima, medians = (
                    divide(*(entry[figure] if entry else None for entry in best))
                    for figure in ("min_ms", "median_ms")
                )
                claim = f"{group_title(entries[0])}: {_label(ours)}'s speed over {_label(peer)}'s"
                found.append(Target(claim, minima, 1, medians=medians))
    return found


def targets(data: dict[str, Any]) -> list[Target]:
    """The targets, for a CPU or a GPU, with the measurements of a run."""
    if any(entry["device"] == "cuda" for entry in data["results"]):
        return gpu_targets(data["results"])
    run = Run(data)
    found: list[Target] = []

    def add(claim: str, pair: Pair, bound: float | None, at_most: bool = False) -> None:
        found.append(Target(claim, pair[0], bound, at_most, pair[1]))

    def memory(claim: str, ours: str, peer: str, size: Any, bound: float, **where: Any) -> None:
        share = divide(*(run.least("peak_mib", n, size, **where) for n in (ours, peer)))
        add(claim, (share, None), bound, at_most=True)

    claim, peer = "800x1344: Tiny's {} over the released algorithm's", "released-tiny"
    add(claim.format("speed"), run.faster(TINY, peer, LARGE), 30)
    memory(claim.format("peak memory"), TINY, peer, LARGE, 0.25)
    for size, ours, peer, bound in SPEEDS:
        claim = f"{size[0]}x{size[1]}: {_label(ours)}'s speed over {_label(peer)}'s"
        add(claim, run.faster(ours, peer, size), bound)
    claim = "800x1344: share of the best matrix product that SOFT++ Tiny reaches"
    tiny = run.settings(TINY, LARGE)
    add(claim, (rates(tiny[0], run.ceilings)[0] if tiny else None, None), 0.65)
    step = dict(mode="train", batch=2)
    for ours, peer, bound in TRAINING:
        claim = f"training step, 512x512, batch 2: {_label(ours)}'s"
        pair = run.faster(ours, peer, MIDDLE, **step)
        add(f"{claim} speed over {_label(peer)}'s", pair, bound)
        if peer.startswith("pvtv2"):
            claim = f"{claim} peak memory over {_label(peer)}'s"
            memory(claim, ours, peer, MIDDLE, 0.5, **step)
    half, single = (
        [run.least(figure, TINY, LARGE, dtype=dtype) for figure in ("min_ms", "median_ms")]
        for dtype in ("bfloat16", "float32")
    )
    claim = "800x1344: SOFT++ Tiny's speed in bfloat16 over that in float32"
    add(claim, (divide(single[0], half[0]), divide(single[1], half[1])), 1.8)
    for peer in ("swin-tiny", "convnext-tiny", "resnet-50"):
        claim = f"800x1344, bfloat16: {_label(OURS_SMALL)}'s speed over {_label(peer)}'s"
        add(claim, run.faster(OURS_SMALL, peer, LARGE, dtype="bfloat16"), 1.4)
    for backbone in (TINY, OURS_SMALL, TINY + UNBOUNDED):
        for side in (2048, 4096):
            for figure, word in (("min_ms", "time"), ("peak_mib", "peak memory")):
                there, here = (run.least(figure, backbone, (s, s)) for s in (side, 1024))
                grown = divide(divide(there, here), (side / 1024) ** 2)
                keys = "" if backbone.endswith(UNBOUNDED) else ", max_keys=2048"
                claim = f"{_label(backbone)}{keys}: {word} per pixel at {side}x{side}"
                claim += " over 1024x1024"
                add(claim, (grown, None), 1.25, at_most=True)
    newton = run.faster(TINY, "softpp-tiny-newton", LARGE)
    claim = "800x1344: time with released landmarks and Newton over that with those by content"
    add(claim, newton, 2, at_most=True)
    for task, size in TASKS:
        for ours, peer in ((TINY, "pvtv2-b1"), (OURS_SMALL, "swin-tiny")):
            claim = f"{task}, {size[0]}x{size[1]}: speed with {_label(ours)} over {_label(peer)}"
            add(claim, run.faster(ours, peer, size, task=task), 1)
    return found + sequence_targets(data["sequence"]) + onnx_targets(data["onnx"])


def sequence_targets(entries: Sequence[Entry]) -> list[Target]:
    """Those of sequence models; none where nothing was measured."""
    plain = [
        entry
        for entry in entries
        if (entry["device"], entry["dtype"], entry["compiled"]) == ("cpu", "float32", False)
    ]
    names = [(entry["name"], entry["tokens"], entry["mode"]) for entry in plain]
    times = {name: (entry["min_ms"], entry["median_ms"]) for name, entry in zip(names, plain)}
    memory = {name: entry["peak_mib"] for name, entry in zip(names, plain) if entry["peak_mib"]}
    found = []
    for name, tokens, mode in times:
        if name == "softpp" and tokens >= 2048:
            where, ours = f"{tokens} tokens, {mode}: SOFT++'s", times[name, tokens, mode]
            if peer := times.get(("softmax", tokens, mode)):
                claim = f"{where} speed over that of softmax attention"
                ratios = [a / b for a, b in zip(peer, ours)]
                found.append(Target(claim, ratios[0], 1, medians=ratios[1]))
            others = [other for other in LINEAR if (other, tokens, mode) in times]
            if others:
                fastest = min(others, key=lambda other: times[other, tokens, mode])
                peer = times[fastest, tokens, mode]
                claim = f"{where} speed over the fastest linear one's, {SEQUENCES[fastest][0]}"
                ratios = [a / b for a, b in zip(peer, ours)]
                found.append(Target(claim, ratios[0], None, medians=ratios[1]))
            if (first := times.get((name, 2048, mode))) and tokens > 2048:
                shares = [a / b / (tokens / 2048) for a, b in zip(ours, first)]
                claim = f"{where} time per token over that at 2048"
                found.append(Target(claim, shares[0], 1.25, at_most=True, medians=shares[1]))
            if own := memory.get((name, tokens, mode)):
                if peer_memory := memory.get(("softmax", tokens, mode)):
                    claim = f"{where} peak memory over that of softmax attention"
                    found.append(Target(claim, own / peer_memory, 1, at_most=True))
                if tokens > 2048 and (first_memory := memory.get((name, 2048, mode))):
                    claim = f"{where} peak memory per token over that at 2048"
                    share = own / first_memory / (tokens / 2048)
                    found.append(Target(claim, share, 1.25, at_most=True))
    return found


def onnx_targets(entries: Sequence[Entry]) -> list[Target]:
    """Those of exported backbones; none where nothing was measured."""
    times = {
        (entry["backbone"], entry["runtime"].partition(" ")[0]): entry
        for entry in entries
        if tuple(entry["size"]) == (224, 224) and entry["batch"] == 1
    }
    found = []
    for (name, runtime), entry in times.items():
        if runtime != "torch" and (peer := times.get((name, "torch"))):
            ratios = [peer[figure] / entry[figure] for figure in ("min_ms", "median_ms")]
            claim = f"224x224: {_label(name)}'s speed in {runtime} over torch's"
            found.append(Target(claim, ratios[0], 2, medians=ratios[1]))
    return found


INTRODUCTION = """# Benchmarks

Generated by `python -m mmsoft.benchmark --write-docs`; do not edit.

The models of a table take turns, every one warmed at the measured shape (of a call above 20 s the
first run counts); images larger than 1024x1024, which 800x1344 is, and calls above 4 s have fewer
runs; q10 and q90 are quantiles of so many runs. All ratios and shares are of minima, which other
work on the machine disturbs least; the table of targets has the same ratios of medians beside them;
images/s are of medians. Peak memory is that of a fresh process above what it holds with the model
and its input loaded, on a GPU that of torch's allocations. Weights are random. Peers are at their
best: the attention of PVT and PVTv2 runs fused (Swin and DaViT have their own, which store the
matrix of a window), BatchNorms are folded into convolutions in forward passes of backbones alone
(ours has none by default; whole models are measured as they are), and on a CPU every peer
is measured in both memory formats; targets and the comparison take the faster. ResNet trains with
its first stage frozen, as its config says, which makes its step cheaper. A multiply-add counts as
one; multiply-adds are of one image's forward pass, with the Newton-Raphson iteration where the
solver is one. "Ours" is the SOFT++ of the peer's size: Tiny for PVT-Tiny, PVTv2-B1 and VAN-B1,
Small for PVTv2-B2, Swin-T, ConvNeXt-T, ResNet-50 and DaViT-T, Medium for PVTv2-B3, Swin-S,
ConvNeXt-S and ResNet-101, Large for PVTv2-B4. VAN and DaViT are newer ones that are linear in the
number of tokens like ours and have features at four strides: large convolution kernels as
attention, and attention between channels in turns with windows. SOFT++ has at most 49 landmarks
where nothing else is said, of the kind that each run names, and at most 2048 keys in stage 4
(`max_keys`, reached above 1440x1440 pixels); landmarks of Newton rows are released ones. The
released algorithm has one landmark for every 32x32 pixels: 49 at 224x224, 256 at 512x512, 1050 at
800x1344. `train` is a forward and a backward pass; `bfloat16` is autocast. "Of product" is the
share of the device's best matrix product (2 FLOPs to a multiply-add; the best of several
measurements over the run) that the counted multiply-adds reach, those of attention included; "of
copy" that of its best copy which the bytes read and written by all operators reach; it can exceed
100 % where caches help. The rest is the gap to the ceilings.
"""
HEADINGS = {
    "results": "Backbones",
    "scaling": "Growth with the image",
    "whole": "Whole detectors and segmentors, test loop",
    "operator": "Attention layers alone",
    "sequence": "Small models of sequences",
    "onnx": "Exported to ONNX",
}
PEERS = (
    "How many times as fast as the peer, in its faster memory format, the SOFT++ of its size is."
)
NOTES = {
    "operator": "64 channels, 2 heads, projections included; where a row names no number, each "
    "package's own: 256 projected tokens (Linformer), 110 random features (Performer). 256 is "
    "Nyströmformer's own number of landmarks, 49 ours. Softmax attention as torch fuses it, and "
    "with its matrix stored, as far as 16 GiB suffice.",
    "sequence": "The model of the Long Range Arena (2 blocks, 64 channels, 2 heads) with each "
    "attention: 64 landmarks for ours and Nyströmformer, the defaults of their packages for the "
    "others.",
    "onnx": "Backbones as `export_onnx.py --part backbone` writes them for one size, run by "
    "onnxruntime in turns with torch, on as many threads; ratios are to torch. Memory is not "
    "measured.",
    "whole": "`model.test_step` on random images, pre- and postprocessing included, with 80 (COCO) "
    "and 150 (ADE20K) classes.",
}


RELEASE = "released-tiny"
STEPS = (RELEASE, *(name for name in LANDMARKS if "content" not in name), TINY)
STEPS += tuple(name for name in LANDMARKS if "content" in name)
ALL_THE_WAY = """What brought the speed over the released algorithm, step by step, SOFT++ Tiny on
one image of 800x1344 pixels, measured in turns. mIoU is that of segmentors of the data set that
needs attention, trained on images of 128x128 pixels and tested at 800x1344 with each setting
([the method](method.md#trained-small-tested-large)): by content with the default norms of the patch
embeddings, mean and range of three seeds, released landmarks with BatchNorm, as they were, one
seed. The commit that was timed had GroupNorm in all of them by default, which has less there, and
BatchNorm has more: [figures of each](method.md#what-the-norm-has-to-do-with-it). The released
algorithm computes what the second row does and has no model of its own there. What a budget changes
in the terms of released weights, block by block, is
[there](method.md#trained-small-tested-large) as well."""


def evidence(rows: Sequence[dict[str, Any]], name: str) -> tuple[str, str]:
    """Number of landmarks and mIoU at 800x1344 with one of ``STEPS``, of landmark_budgets.json."""
    if name == RELEASE:
        return "1050", "-"
    solver, budget = name.split("-")[2:] if name in LANDMARKS else ("content", "49")
    by_content = solver == "content"
    wanted = ("by content", "none") if by_content else ("released, BatchNorm", solver)
    found = [
        row
        for row in rows
        if (row["model"], row["solver"]) == wanted
        and (str(row["budget"]), row["size"]) == (budget, list(LARGE))
        and "mIoU" in row
    ]
    counts, values = [row["landmarks"] for row in found], [row["mIoU"] for row in found]
    words = f"{sum(values) / len(values):.1f}" if values else "-"
    if len(values) > 1:
        words += f" ({min(values):.1f}-{max(values):.1f})"
    if not by_content:  # their number is the grid's, whatever the weights
        return str(counts[0]) if counts else budget, words
    if budget == "all" and counts:
        words += f", {min(counts)}-{max(counts)} landmarks"
    return "no limit" if budget == "all" else f"at most {budget}", words


def steps_table(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """From the released algorithm to ours; only a head where that was not measured."""
    head = ["", "landmarks", "GMACs", "min ms", "median ms", "runs", "peak MiB"]
    table = [[*head, "times as fast", "times the step before", "mIoU (%)"]]
    run = Run(data)
    times = {name: run.settings(name, LARGE) for name in STEPS}
    if not times[RELEASE] or not any(times[name] for name in LANDMARKS):
        return table
    first = before = times[RELEASE][0]
    for name in (name for name in STEPS if times[name]):
        entry = times[name][0]
        count, words = evidence(rows, name)
        row = [label_of(entry), count, number(entry.get("gmacs"))]
        row += [number(entry[key], 4) for key in ("min_ms", "median_ms")]
        row += [str(entry.get("repeats", "-")), number(entry["peak_mib"], 4)]
        row += [number(divide(e["min_ms"], entry["min_ms"])) for e in (first, before)]
        table.append([*row, words])
        before = entry
    return table


def group_title(entry: Entry) -> str:
    """The heading of one table."""
    words = [entry["task"]] if "task" in entry else []
    if "tokens" in entry:
        words.append(f"{entry['tokens']} tokens")
    else:
        words.append(size_of(entry))
    words += [f"batch {entry['batch']}", entry["mode"], entry["device"], entry["dtype"]]
    return ", ".join(words + ["compiled"] * entry["compiled"])


def target_rows(data: dict[str, Any]) -> list[list[str]]:
    """The table of targets; empty if the run has nothing to do with them."""
    found = targets(data)
    if all(target.measured is None for target in found):
        return []
    if not data["results"]:
        found = [target for target in found if target.measured is not None]
    return verdicts(found)


def verdicts(found: Sequence[Target]) -> list[list[str]]:
    """Targets as rows of a table."""
    answers = {True: "yes", False: "**no**", None: "not measured"}
    rows = [["target", "measured", "of medians", "wanted", "met"]]
    for target in found:
        wanted = (
            "-" if target.bound is None else f"{'≤' if target.at_most else '≥'} {target.bound:g}"
        )
        met = "-" if target.bound is None and target.measured is not None else answers[target.met]
        rows.append([target.claim, number(target.measured), number(target.medians), wanted, met])
    return rows


def limits(ceilings: dict[str, float]) -> str:
    """The ceilings of a run in words."""
    return ", ".join(
        f"{number(value)} GB/s copied (read and written)"
        if name == "copy_gb_s"
        else f"{number(value)} TFLOP/s in {name.removesuffix('_tflops')} matrix products"
        for name, value in ceilings.items()
    )


def commit_of(data: dict[str, Any]) -> str:
    """The commit of a run as a sentence."""
    return f"Commit {data['commit']}. " if data.get("commit") else ""


KERNELS = """Milliseconds of a call, the median of {repeats} repeats: of the device, which replays
calls from a CUDA graph (timed by "graph") or takes them in a row where none can be recorded
("events"), and of the processor until it has handed one over ("host"). Operands stay in the
device's cache where they fit. The error is against the definition in float64; a way whose error
plain torch's does not allow is marked as wrong. The roofline's share is that of the least time in
which the operands could be read and written once in memory, and multiplied."""


def kernel_targets(entries: Sequence[dict[str, Any]]) -> list[Target]:
    """What is wanted of the kernels on a GPU: of products, only if all of a size are right."""
    ours = [entry for entry in entries if entry["way"] == "triton"]
    right = [entry for entry in ours if entry.get("right") and "median_ms" in entry]
    found = []
    for tokens in sorted({e["tokens"] for e in entries if e["operation"] in PRODUCTS}):
        planned, tried, done = (
            [
                (entry["operation"], entry["landmarks"], entry["mode"])
                for entry in some
                if entry["operation"] in PRODUCTS and entry["tokens"] == tokens
            ]
            for some in (entries, ours, right)
        )
        shares = [e["roofline"] for e in right if e["tokens"] == tokens and "roofline" in e]
        least = min(shares) if set(planned) == set(done) and len(tried) == len(done) else None
        claim = f"streamed products of {tokens} tokens, all right: least share of the roofline"
        found.append(Target(claim, least, 0.6))
    for mode, most in (("forward", 0.14), ("backward", 0.01)):
        times = [
            e["median_ms"]
            for e in right
            if (e["operation"], e["landmarks"], e["mode"]) == ("newton", 64, mode)
        ]
        claim = f"Newton of {MATRICES} matrices of 64 landmarks, {mode} (ms); wanted is what "
        claim += "LaplacianFormer's authors publish of theirs, on an A100, of unknown batch"
        found.append(Target(claim, min(times, default=None), most, True))
    return found


def of_kernels(data: dict[str, Any]) -> str:
    """The part of a run of the kernels."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    rows = verdicts(kernel_targets(data["kernels"]))
    return (
        f"## Kernels, {data['device']}\n\n"
        f"{data['date'][:10]}; {versions}. {commit_of(data).strip()}\n"
        f"Limits of this device: {limits(data['ceilings'])}.\n\n"
        f"{markdown(rows)}\n\n{KERNELS.format(repeats=data['repeats'])}\n\n"
        f"{kernel_table(data['kernels'], 'pipe')}\n"
    )


def write_docs(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ``benchmarks.md`` and, under ``benchmarks/``, its plots.

    Accuracies with several landmark budgets are those of ``landmark_budgets.json`` there, if any.
    Runs of :mod:`mmsoft.benchmark.kernels` come last.
    """
    parts = [INTRODUCTION]
    kernels = [run for run in runs if "kernels" in run]
    runs = merge([run for run in runs if "kernels" not in run])
    path = folder / "landmark_budgets.json"
    budgets = json.loads(path.read_text()) if path.is_file() else []
    drawn: set[str] = set()
    for index, data in enumerate(runs, 1):
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        best = "; ".join(map(limits, data["limits"]))
        parts.append(
            f"## {data['device']}\n\n{data['threads']} threads, {data['date'][:10]}; {versions}.\n"
            f"{commit_of(data)}SOFT++'s landmarks: {landmarks_of(data)}.\n"
            f"Limits of this device, as measured in each run: {best}.\n"
            f"\n```\n{data['command']}\n```\n"
        )
        if rows := target_rows(data):
            parts.append(f"### Targets\n\n{markdown(rows)}\n")
        if len(rows := against_peers(data["results"])) > 1:
            parts.append(f"### Speed over other backbones\n\n{PEERS}\n\n{markdown(rows)}\n")
        if len(rows := steps_table(data, budgets)) > 1:
            heading = "From the released algorithm to ours"
            parts.append(f"### {heading}\n\n{ALL_THE_WAY}\n\n{markdown(rows)}\n")
        sections = {section for section in HEADINGS if data[section]}
        prefix = f"{index}_" if sections & drawn else ""
        drawn |= sections
        pictures = plot(data, folder / "benchmarks", prefix)
        for section, heading in HEADINGS.items():
            if not data[section]:
                continue
            parts.append(f"### {heading}\n")
            if section in NOTES:
                parts.append(f"{NOTES[section]}\n")
            for name in pictures[section]:
                drawing = Path(name).with_suffix(".svg")
                parts.append(f"![{heading}](benchmarks/{name})\n\n[SVG](benchmarks/{drawing})\n")
            # Settings that only the table above is about are there.
            shown = [e for e in data[section] if e.get("backbone") not in LANDMARKS]
            for _, group in groupby(shown, of_kind):
                entries = list(group)
                kind = section, of_kind(entries[0])
                rows = table(entries, data["limits_of"].get(kind, data["limits"][0]))
                parts.append(f"**{group_title(entries[0])}**\n\n{markdown(rows)}\n")
        if data.get("skipped"):
            rows = [["left out", "", "reason"]] + [
                [s["name"], f"{'x'.join(map(str, s['size']))}, {s['mode']}", s["reason"]]
                for s in data["skipped"]
            ]
            parts.append(f"### Left out\n\n{markdown(rows)}\n")
    parts += map(of_kernels, kernels)
    with write_whole(folder / "benchmarks.md") as partial:
        partial.write_text("\n".join(parts))
    print(f"wrote {folder / 'benchmarks.md'}")
