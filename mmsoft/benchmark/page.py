"""The generated page, ``benchmarks.md``: targets, tables, plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmsoft.benchmark.cases import BACKBONES, CHANNELS_LAST
from mmsoft.benchmark.plots import plot
from mmsoft.benchmark.report import (
    Entry,
    landmarks_of,
    markdown,
    merge,
    number,
    of_kind,
    size_of,
    table,
)
from mmsoft.fileio import write_whole


@dataclass
class Target:
    """A claim about one run: ``measured`` is at least, or at most, ``bound``."""

    claim: str
    measured: float | None
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def targets(data: dict[str, Any]) -> list[Target]:
    """The targets, for a CPU in float32, with the measurements of a run."""
    plain = [
        entry
        for section in ("results", "scaling", "whole")
        for entry in data[section]
        if (entry["device"], entry["dtype"], entry["compiled"]) == ("cpu", "float32", False)
    ]

    def value(figure: str, backbone: str, size: tuple[int, int], **where: Any) -> float | None:
        where = dict(mode="forward", batch=1, task=None) | where
        for entry in plain:
            same = entry["backbone"] == backbone and tuple(entry["size"]) == size
            if same and all(entry.get(key) == wanted for key, wanted in where.items()):
                return entry[figure]
        return None

    def divide(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    def faster(ours: str, peer: str, size: tuple[int, int], **where: Any) -> float | None:
        settings = (peer, peer + CHANNELS_LAST)
        found = (value("median_ms", name, size, **where) for name in settings)
        best = min((time for time in found if time is not None), default=None)
        return divide(best, value("median_ms", ours, size, **where))

    def name(backbone: str) -> str:
        return BACKBONES[backbone].label

    large, small = (800, 1344), ((512, 512), (224, 224))
    tiny, middle = "softpp-tiny", "softpp-small"
    claim, peer = "800x1344: Tiny's {} over the released algorithm's", "released-tiny"
    memory = divide(*(value("peak_mib", n, large) for n in (tiny, peer)))
    found = [
        Target(claim.format("speed"), faster(tiny, peer, large), 30),
        Target(claim.format("peak memory"), memory, 0.25, at_most=True),
    ]
    pairs: list[tuple[tuple[int, int], str, str, float]] = [
        (large, tiny, "pvtv2-b1", 2.5),
        (large, tiny, "pvt-tiny", 2.2),
        (large, middle, "pvtv2-b2", 3),
        (large, middle, "swin-tiny", 1.2),
        (large, middle, "convnext-tiny", 1),
    ]
    for size in small:
        pairs += [(size, tiny, "pvtv2-b1", 1), (size, middle, "pvtv2-b2", 1)]
        pairs += [(size, middle, "swin-tiny", 1)]
    for size, ours, peer, bound in pairs:
        claim = f"{size[0]}x{size[1]}: {name(ours)}'s speed over {name(peer)}'s"
        found.append(Target(claim, faster(ours, peer, size), bound))
    step = dict(mode="train", batch=2)
    for ours, peer in ((tiny, "pvtv2-b1"), (middle, "pvtv2-b2")):
        claim = f"training step, 512x512, batch 2: {name(ours)}'s"
        memory = divide(*(value("peak_mib", n, (512, 512), **step) for n in (ours, peer)))
        found += [
            Target(f"{claim} speed over {name(peer)}'s", faster(ours, peer, (512, 512), **step), 1),
            Target(f"{claim} peak memory over {name(peer)}'s", memory, 1, at_most=True),
        ]
    for backbone in (tiny, middle):
        for side in (2048, 4096):
            for figure, word in (("median_ms", "time"), ("peak_mib", "peak memory")):
                there, here = (value(figure, backbone, (s, s)) for s in (side, 1024))
                grown = divide(there, here)
                share = grown and grown / (side / 1024) ** 2
                claim = f"{name(backbone)}: {word} per pixel at {side}x{side} over 1024x1024"
                found.append(Target(claim, share, 1.25, at_most=True))
    newton = faster("softpp-tiny", "softpp-tiny-newton", large)
    claim = "800x1344: time with released landmarks and Newton over that with those by content"
    found.append(Target(claim, newton, 2, at_most=True))
    for task, size in (("RetinaNet", large), ("UperNet", (512, 512))):
        for ours, peer in ((tiny, "pvtv2-b1"), (middle, "swin-tiny")):
            claim = f"{task}: images/s with {name(ours)} over those with {name(peer)}"
            found.append(Target(claim, faster(ours, peer, size, task=task), 1))
    return found + sequence_targets(data["sequence"]) + onnx_targets(data["onnx"])


def sequence_targets(entries: Sequence[Entry]) -> list[Target]:
    """Those of sequence models; none where nothing was measured."""
    times = {
        (entry["name"], entry["tokens"], entry["mode"]): entry["median_ms"]
        for entry in entries
        if (entry["device"], entry["dtype"], entry["compiled"]) == ("cpu", "float32", False)
    }
    found = []
    for name, tokens, mode in times:
        if name == "softpp" and tokens >= 2048:
            where, ours = f"{tokens} tokens, {mode}: SOFT++'s", times[name, tokens, mode]
            if peer := times.get(("softmax", tokens, mode)):
                claim = f"{where} speed over that of softmax attention"
                found.append(Target(claim, peer / ours, 1))
            if (first := times.get((name, 2048, mode))) and tokens > 2048:
                share = ours / first / (tokens / 2048)
                claim = f"{where} time per token over that at 2048"
                found.append(Target(claim, share, 1.25, at_most=True))
    return found


def onnx_targets(entries: Sequence[Entry]) -> list[Target]:
    """Those of exported backbones; none where nothing was measured."""
    times = {
        (entry["backbone"], entry["runtime"].partition(" ")[0]): entry["median_ms"]
        for entry in entries
        if tuple(entry["size"]) == (224, 224) and entry["batch"] == 1
    }
    return [
        Target(
            f"224x224: {BACKBONES[name].label}'s speed in {runtime} over torch's", peer / time, 2
        )
        for (name, runtime), time in times.items()
        if runtime != "torch" and (peer := times.get((name, "torch")))
    ]


INTRODUCTION = """# Benchmarks

Generated by `python -m mmsoft.benchmark --write-docs`; do not edit.

Times are medians of interleaved samples, every model warmed at the measured shape; q10 and q90 are
quantiles. Peak memory is that of a fresh process above what it holds with the model and its input
loaded. Weights are random. Peers' attention runs fused, and those with convolutions are measured in
both memory formats; targets take the faster. A multiply-add counts as one; multiply-adds are of one
image's forward pass, with the Newton-Raphson iteration where the solver is one. "Ours" is the
SOFT++ of the peer's size: Tiny for PVT-Tiny and PVTv2-B1, Small for PVTv2-B2, Swin-T, ConvNeXt-T
and ResNet-50. SOFT++ has at most 49 landmarks, of the kind that each run names; those of Newton
rows are released ones. `train` is a forward and a backward pass. "Of product" is the share of the
device's best matrix product (2 FLOPs to a multiply-add) that the counted multiply-adds reach, "of
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
NOTES = {
    "operator": "64 channels, 2 heads, projections included; each package's own defaults, "
    "49 landmarks for ours.",
    "sequence": "The model of the Long Range Arena (2 blocks, 64 channels, 2 heads) with each "
    "attention: 64 landmarks for ours and Nyströmformer, the defaults of their packages for the "
    "others.",
    "onnx": "Backbones as `export_onnx.py --part backbone` writes them for one size, run by "
    "onnxruntime in turns with torch, on as many threads; ratios are to torch. Memory is not "
    "measured.",
    "whole": "`model.test_step` on random images, pre- and postprocessing included, with 80 (COCO) "
    "and 150 (ADE20K) classes.",
}


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
    if all(target.met is None for target in found):
        return []
    answers = {True: "yes", False: "**no**", None: "not measured"}
    rows = [["target", "measured", "wanted", "met"]]
    for target in found:
        wanted = f"{'≤' if target.at_most else '≥'} {target.bound:g}"
        rows.append([target.claim, number(target.measured), wanted, answers[target.met]])
    return rows


def commit_of(data: dict[str, Any]) -> str:
    """The commit of a run as a sentence."""
    return f"Commit {data['commit']}. " if data.get("commit") else ""


def write_docs(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ``benchmarks.md`` and, under ``benchmarks/``, its plots."""
    parts = [INTRODUCTION]
    runs = merge(runs)
    for index, data in enumerate(runs, 1):
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        best = ", ".join(
            f"{number(value)} GB/s copied (read and written)"
            if name == "copy_gb_s"
            else f"{number(value)} TFLOP/s in {name.removesuffix('_tflops')} matrix products"
            for name, value in data.get("ceilings", {}).items()
        )
        parts.append(
            f"## {data['device']}\n\n{data['threads']} threads, {data['date'][:10]}; {versions}.\n"
            f"{commit_of(data)}SOFT++'s landmarks: {landmarks_of(data)}.\n"
            f"Limits of this device, as measured: {best}.\n\n```\n{data['command']}\n```\n"
        )
        if rows := target_rows(data):
            parts.append(f"### Targets\n\n{markdown(rows)}\n")
        prefix = f"{index}_" if index > 1 else ""
        pictures = plot(data, folder / "benchmarks", prefix)
        for section, heading in HEADINGS.items():
            if not data[section]:
                continue
            parts.append(f"### {heading}\n")
            if section in NOTES:
                parts.append(f"{NOTES[section]}\n")
            parts += [f"![{heading}](benchmarks/{name})\n" for name in pictures[section]]
            for _, group in groupby(data[section], of_kind):
                entries = list(group)
                rows = table(entries, data.get("ceilings"))
                parts.append(f"**{group_title(entries[0])}**\n\n{markdown(rows)}\n")
        if data.get("skipped"):
            rows = [["left out", "", "reason"]] + [
                [s["name"], f"{'x'.join(map(str, s['size']))}, {s['mode']}", s["reason"]]
                for s in data["skipped"]
            ]
            parts.append(f"### Left out\n\n{markdown(rows)}\n")
    with write_whole(folder / "benchmarks.md") as partial:
        partial.write_text("\n".join(parts))
    print(f"wrote {folder / 'benchmarks.md'}")
