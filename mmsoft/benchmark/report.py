"""Output: tables, ``benchmark.json``, ``benchmarks.md``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import Any

from tabulate import tabulate

from mmsoft.benchmark.cases import BACKBONES, OPERATORS, published
from mmsoft.fileio import write_whole

Entry = dict[str, Any]
SECTIONS = ("results", "scaling", "whole", "operator")
NEEDED = ("device", "threads", "versions", "date", "command", *SECTIONS)
KIND = ("device", "dtype", "compiled", "mode", "batch")
FIELDS = dict(
    results=(*KIND, "backbone", "size", "images_per_second"),
    operator=(*KIND, "name", "tokens", "peak_mib"),
)


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write ``benchmark.json``."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a ``benchmark.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one.
    """
    try:
        data = json.loads(path.read_text())
        if missing := [key for key in NEEDED if key not in data]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for section, fields in FIELDS.items():
            for entry in data[section]:
                if missing := [key for key in fields if key not in entry]:
                    raise ValueError(f"an entry under '{section}' lacks {', '.join(missing)}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the benchmark's JSON: {error}") from None
    return data


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def of_kind(entry: Entry) -> tuple:
    """Entries with the same kind were measured in turns and can be compared."""
    size = tuple(entry.get("size", ()))
    task = entry.get("task", "")
    return (
        *(task, entry["device"], entry["dtype"], entry["compiled"]),
        *(entry["mode"] != "forward", size, entry["batch"], entry.get("tokens", 0)),
    )


def label_of(entry: Entry) -> str:
    """The display name."""
    if "tokens" in entry:
        return OPERATORS[entry["name"]][0]
    name = entry["backbone"]
    return BACKBONES[name].label if name in BACKBONES else name


def size_of(entry: Entry) -> str:
    """The size of the images: height x width."""
    return "{}x{}".format(*entry["size"])


def ours_for(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Our entry that ``entry`` is compared with: of its size, measured in turns with it."""
    for other in entries:
        if of_kind(other) != of_kind(entry):
            continue
        if "tokens" in entry:
            if other["name"] == "softpp":
                return other
        elif other["backbone"] == BACKBONES[entry["backbone"]].ours:
            return other
    return None


def ratio(entry: Entry, entries: Sequence[Entry], figure: str) -> float | None:
    """``figure`` of an entry as a multiple of ours."""
    ours = ours_for(entry, entries)
    if ours is None or not ours.get(figure) or entry.get(figure) is None:
        return None
    return entry[figure] / ours[figure]


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many significant digits, none of its integer part lost."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def rates(entry: Entry, ceilings: dict[str, float]) -> tuple[float | None, float | None]:
    """Shares of the device's best matrix product and copy that an eager forward pass reaches."""
    seconds = entry["median_ms"] / 1e3
    product, copy = None, None
    if entry.get("traffic_gib") is None:
        return None, None
    if entry.get("gmacs") and f"{entry['dtype']}_tflops" in ceilings:
        flops = 2e9 * entry["gmacs"] * entry["batch"]
        product = flops / seconds / (1e12 * ceilings[f"{entry['dtype']}_tflops"])
    if "copy_gb_s" in ceilings:
        copy = entry["traffic_gib"] * 2**30 / seconds / (1e9 * ceilings["copy_gb_s"])
    return product, copy


def table(entries: Sequence[Entry], ceilings: dict[str, float] | None = None) -> list[list[str]]:
    """Header and rows of entries of one kind, with ``rates`` if ``ceilings`` are given."""
    first = entries[0]
    with_rates = bool(ceilings) and any("traffic_gib" in entry for entry in entries)
    macs = any("gmacs" in entry for entry in entries)
    head = ["", *["params (M)", "GMACs"] * macs, "median ms", "q10", "q90"]
    head += ["images/s"] * ("images_per_second" in first) + ["peak MiB", "time / ours"]
    head += ["memory / ours"] + ["of product", "of copy"] * with_rates
    rows = [head]
    for entry in entries:
        row = [label_of(entry)]
        if macs:
            row += [number(entry.get("params_m")), number(entry.get("gmacs"))]
        row += [number(entry[key], 4) for key in ("median_ms", "q10_ms", "q90_ms")]
        if "images_per_second" in first:
            row.append(number(entry["images_per_second"]))
        row.append(number(entry["peak_mib"], 4))
        row += [number(ratio(entry, entries, key)) for key in ("median_ms", "peak_mib")]
        if with_rates:
            shares = rates(entry, ceilings or {})
            row += ["-" if share is None else f"{100 * share:.0f} %" for share in shares]
        rows.append(row)
    return rows


def print_group(section: str, entries: Sequence[Entry]) -> None:
    """Print one table."""
    if not entries:
        print("   nothing could be measured")
        return
    print(indent(_tabulate(table(entries), "plain"), "   "))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first being its head."""
    return _tabulate(rows, "pipe")


def _tabulate(rows: Sequence[Sequence[str]], style: str) -> str:
    align = ("left", *["right"] * (len(rows[0]) - 1))
    return tabulate(rows[1:], rows[0], style, colalign=align, disable_numparse=True)


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


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
        return divide(*(value("median_ms", name, size, **where) for name in (peer, ours)))

    def name(backbone: str) -> str:
        return BACKBONES[backbone].label

    large, small = (800, 1344), ((512, 512), (224, 224))
    tiny, middle = "softpp-tiny", "softpp-small"
    found = [
        Target(
            "800x1344: Tiny's speed over the released algorithm's",
            faster(tiny, "released-tiny", large),
            30,
        ),
        Target(
            "800x1344: Tiny's peak memory over the released algorithm's",
            divide(*(value("peak_mib", n, large) for n in (tiny, "released-tiny"))),
            0.25,
            at_most=True,
        ),
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
    found.append(Target("800x1344: time of Newton over that of direct", newton, 2, at_most=True))
    for task, size in (("RetinaNet", large), ("UperNet", (512, 512))):
        for ours, peer in ((tiny, "pvtv2-b1"), (middle, "swin-tiny")):
            claim = f"{task}: images/s with {name(ours)} over those with {name(peer)}"
            found.append(Target(claim, faster(ours, peer, size, task=task), 1))
    return found


# ---------------------------------------------------------------------------------------------
# benchmarks.md
# ---------------------------------------------------------------------------------------------

INTRODUCTION = """# Benchmarks

Generated by `python -m mmsoft.benchmark --write-docs`; do not edit.

Times are medians of interleaved samples, every model warmed at the measured shape; q10 and q90 are
quantiles. Peak memory is that of a fresh process above what it holds with the model and its input
loaded. Weights are random. A multiply-add counts as one; multiply-adds are of one image's forward
pass, with the Newton-Raphson iteration where the solver is one. "Ours" is the SOFT++ of the peer's
size: Tiny for PVT-Tiny and PVTv2-B1, Small for PVTv2-B2, Swin-T, ConvNeXt-T and ResNet-50. SOFT++
stands for the settings of the dense configs, 49 landmarks at most and the direct solver, unless
it says Newton. `train` is a forward and a backward pass. "Of product" is the share of the device's
best matrix product (2 FLOPs to a multiply-add) that the counted multiply-adds reach, "of copy" that
of its best copy which the bytes read and written by all operators reach; it can exceed 100 % where
caches help. The rest is the gap to the ceilings.
"""
HEADINGS = {
    "results": "Backbones",
    "scaling": "Growth with the image",
    "whole": "Whole detectors and segmentors, test loop",
    "operator": "Attention layers alone",
}
NOTES = {
    "operator": "64 channels, 2 heads, projections included; each package's own defaults, "
    "49 landmarks for ours.",
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


def overview(data: dict[str, Any]) -> str:
    """The table of ``model_zoo.md``: the speed of plain forward passes, and published accuracy."""
    plain = [e for e in data["results"] if e["mode"] == "forward" and not e["compiled"]]
    plain = [e for e in plain if e["dtype"] == plain[0]["dtype"] and e["batch"] == 1]
    sizes = list(dict.fromkeys(tuple(entry["size"]) for entry in plain))
    head = ["backbone", "params (M)", "top-1, as published (%)"]
    head += [f"images/s at {height}x{width}" for height, width in sizes]
    head += [f"peak MiB at {height}x{width}" for height, width in sizes[-1:]]
    rows, accuracies = [head], published()
    for name in dict.fromkeys(entry["backbone"] for entry in plain):
        if name not in accuracies:
            continue
        mine = {tuple(entry["size"]): entry for entry in plain if entry["backbone"] == name}
        first = next(iter(mine.values()))
        row = [label_of(first), number(first["params_m"]), f"{accuracies[name]:.1f}"]
        row += [number(mine.get(size, {}).get("images_per_second")) for size in sizes]
        row += [number(mine.get(size, {}).get("peak_mib")) for size in sizes[-1:]]
        rows.append(row)
    return markdown(rows) + "\n"


def merge(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join runs of the same device and versions: groups measured again replace the old ones."""
    found: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        key = run["device"], run["threads"], *run["versions"].items()
        if key not in found:
            found[key] = dict(run)
            continue
        old = found[key]
        old["command"] += "\n" + run["command"]
        old["date"] = max(old["date"], run["date"])
        for section in SECTIONS:
            groups: dict[tuple, list[Entry]] = {}
            for entries in (old[section], run[section]):
                groups |= {kind: list(group) for kind, group in groupby(entries, of_kind)}
            old[section] = [entry for group in groups.values() for entry in group]
        old["skipped"] = old.get("skipped", []) + run.get("skipped", [])
    return list(found.values())


def write_docs(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ``benchmarks.md`` and, under ``benchmarks/``, its plots."""
    from mmsoft.benchmark.plots import plot

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
            f"Limits of this device, as measured: {best}.\n\n```\n{data['command']}\n```\n"
        )
        if rows := target_rows(data):
            parts.append(f"### Targets\n\n{markdown(rows)}\n")
        prefix = f"{index}_" if len(runs) > 1 else ""
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
