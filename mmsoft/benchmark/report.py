"""Output: ``benchmark.json``, tables."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import Any

from tabulate import tabulate

from mmsoft.benchmark.cases import BACKBONES, CHANNELS_LAST, published
from mmsoft.fileio import write_whole

Entry = dict[str, Any]
SECTIONS = ("results", "scaling", "whole", "operator", "sequence", "onnx")
NEEDED = ("device", "threads", "versions", "date", "command", *SECTIONS[:4])
KERNELS = ("device", "versions", "date", "ceilings", "repeats", "kernels")
KIND = ("device", "dtype", "compiled", "mode", "batch")
PRODUCTS = ("spread", "gather")  # operations of the kernels' file that have a roofline
MATRICES = 20  # that its inverses take: heads of a batch of two in stage 3
FIELDS = dict(
    results=(*KIND, "backbone", "size", "images_per_second"),
    operator=(*KIND, "name", "label", "tokens", "peak_mib"),
    sequence=(*KIND, "name", "label", "tokens", "peak_mib"),
    onnx=(*KIND, "backbone", "size", "runtime", "min_ms"),
    kernels=("operation", "mode", "tokens", "landmarks", "way"),
)


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write ``benchmark.json``, or ``kernels.json``."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a ``benchmark.json``, or a ``kernels.json`` of :mod:`mmsoft.benchmark.kernels`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one.
    """
    try:
        data = json.loads(path.read_text())
        needed = KERNELS if "kernels" in data else NEEDED
        if missing := [key for key in needed if key not in data]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for section in ("sequence", "onnx") if needed is NEEDED else ():  # older files have not
            data.setdefault(section, [])
        for section, fields in FIELDS.items():
            for entry in data.get(section, []):
                if missing := [key for key in fields if key not in entry]:
                    raise ValueError(f"an entry under '{section}' lacks {', '.join(missing)}")
        for entry in [entry for section in SECTIONS for entry in data.get(section, [])]:
            entry.setdefault("min_ms", entry["median_ms"])  # which older files have not
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the benchmark's JSON: {error}") from None
    return data


# ------------------------------------------------------------------------------------------- tables


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
        return entry["label"]
    name = entry["backbone"]
    label = BACKBONES[name].label if name in BACKBONES else name
    return f"{label}, {entry['runtime']}" if "runtime" in entry else label


def size_of(entry: Entry) -> str:
    """The size of the images: height x width."""
    return "{}x{}".format(*entry["size"])


def ours_for(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Our entry that ``entry`` is compared with: of its size, measured in turns with it."""
    key = "name" if "tokens" in entry else "backbone"
    ours = "softpp" if "tokens" in entry else BACKBONES[entry["backbone"]].ours
    found = (e for e in entries if e[key] == ours and of_kind(e) == of_kind(entry))
    return next(found, None)


def ratio(entry: Entry, entries: Sequence[Entry], figure: str) -> float | None:
    """``figure`` of an entry as a multiple of ours."""
    ours = ours_for(entry, entries)
    return None if ours is None else divide(entry.get(figure), ours.get(figure))


def divide(a: float | None, b: float | None) -> float | None:
    """The ratio; None where either is unknown."""
    return None if a is None or not b else a / b


def at_best(name: str, entries: Sequence[Entry]) -> Entry | None:
    """Of entries of one kind, that of a backbone in the faster memory format."""
    found = [e for e in entries if e["backbone"] in (name, name + CHANNELS_LAST)]
    return min(found, key=lambda entry: entry["min_ms"], default=None)


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many significant digits, none of its integer part lost."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def rates(entry: Entry, ceilings: dict[str, float]) -> tuple[float | None, float | None]:
    """Shares of the device's best matrix product and copy that an eager forward pass reaches."""
    seconds, product, copy = entry["min_ms"] / 1e3, None, None
    best, traffic = f"{entry['dtype']}_tflops", entry.get("traffic_gib")
    eager = entry["mode"] == "forward" and not entry["compiled"]
    if eager and entry.get("gmacs") and best in ceilings:
        product = 2e9 * entry["gmacs"] * entry["batch"] / seconds / (1e12 * ceilings[best])
    if traffic is not None and "copy_gb_s" in ceilings:
        copy = traffic * 2**30 / seconds / (1e9 * ceilings["copy_gb_s"])
    return product, copy


def table(entries: Sequence[Entry], ceilings: dict[str, float] | None = None) -> list[list[str]]:
    """Header and rows of entries of one kind, with ``rates`` if ``ceilings`` are given."""
    first = entries[0]
    with_rates = bool(ceilings) and any("traffic_gib" in entry for entry in entries)
    macs = any("gmacs" in entry for entry in entries)
    times = dict(min_ms="min ms", median_ms="median ms", q10_ms="q10", q90_ms="q90")
    runs = "repeats" in first
    head = ["", *["params (M)", "GMACs"] * macs, *times.values()] + ["runs"] * runs
    head += ["images/s"] * ("images_per_second" in first) + ["peak MiB", "time / ours"]
    head += ["memory / ours"] + ["of product", "of copy"] * with_rates
    rows = [head]
    for entry in entries:
        row = [label_of(entry)]
        if macs:
            row += [number(entry.get("params_m")), number(entry.get("gmacs"))]
        row += [number(entry[key], 4) for key in times] + [str(entry.get("repeats"))] * runs
        if "images_per_second" in first:
            row.append(number(entry["images_per_second"]))
        row.append(number(entry["peak_mib"], 4))
        row += [number(ratio(entry, entries, key)) for key in ("min_ms", "peak_mib")]
        if with_rates:
            shares = rates(entry, ceilings or {})
            row += ["-" if share is None else f"{100 * share:.0f} %" for share in shares]
        rows.append(row)
    return rows


def against_peers(entries: Sequence[Entry]) -> list[list[str]]:
    """How many times as fast ours are as the peers of their size, in the peers' faster format."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(of_kind(entry), []).append(entry)
    head = ["", "ours of its size"]
    for first, *_ in groups.values():
        words = [size_of(first), *[first["mode"]] * (first["mode"] != "forward"), first["dtype"]]
        head.append(", ".join(words + ["compiled"] * first["compiled"]))
    rows = [head]
    for name, peer in BACKBONES.items():
        if peer.channels_last or peer.config.startswith("mmsoft"):
            continue
        found = [[at_best(n, group) for group in groups.values()] for n in (name, peer.ours)]
        ratios = [a and b and a["min_ms"] / b["min_ms"] for a, b in zip(*found)]
        if any(ratios):
            rows.append([peer.label, BACKBONES[peer.ours].label, *map(number, ratios)])
    return rows


def print_group(entries: Sequence[Entry]) -> None:
    """Print a table for each kind."""
    tables = [_tabulate(table(list(group)), "plain") for _, group in groupby(entries, of_kind)]
    print(indent("\n\n".join(tables) or "nothing could be measured", "   "))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first being its head."""
    return _tabulate(rows, "pipe")


def kernel_table(entries: list[dict[str, Any]], style: str = "simple") -> str:
    """Entries of :mod:`mmsoft.benchmark.kernels` in words and numbers."""
    names = ["operation", "mode", "tokens", "landmarks", "way", "median_ms", "timed_by", "host_ms"]
    names += ["error", "roofline"]
    rows = []
    for entry in entries:
        row: list[Any] = [entry.get(name) for name in names]
        if not entry.get("right", True):
            row[names.index("way")] += " (WRONG)"
        rows.append([*row, entry.get("reason", "")])
    head = [name.removesuffix("_ms").replace("_", " ") for name in names]
    return tabulate(rows, [*head, ""], style, floatfmt=".3g", missingval="-")


def _tabulate(rows: Sequence[Sequence[str]], style: str) -> str:
    align = ("left", *["right"] * (len(rows[0]) - 1))
    return tabulate(rows[1:], rows[0], style, colalign=align, disable_numparse=True)


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
        mine: dict[tuple, Entry] = {}
        for size in sizes:
            found = at_best(name, [e for e in plain if tuple(e["size"]) == size])
            mine[size] = found or {}
        first = next(entry for entry in plain if entry["backbone"] == name)
        row = [label_of(first), number(first["params_m"]), f"{accuracies[name]:.1f}"]
        row += [number(mine[size].get("images_per_second")) for size in sizes]
        row += [number(mine[size].get("peak_mib")) for size in sizes[-1:]]
        rows.append(row)
    return markdown(rows) + "\n"


def landmarks_of(run: dict[str, Any]) -> str:
    """Of SOFT++ in a run; runs that do not say were made when the default was another."""
    return run.get("landmarks", "released, with the direct solver")


def merge(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join runs of one device, commit and versions: groups measured again replace the old.

    ``limits`` has the ceilings of each run, ``limits_of`` those of a section's kind of entries.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        what = run["device"], run["threads"], landmarks_of(run), run.get("commit")
        key = (*what, *run["versions"].items())
        if key not in found:
            found[key] = {**run, "limits": [run.get("ceilings", {})], "limits_of": {}}
            continue
        old = found[key]
        old["limits"].append(run.get("ceilings", {}))
        old["command"] += "\n" + run["command"]
        old["date"] = max(old["date"], run["date"])
        for section in SECTIONS:
            groups: dict[tuple, list[Entry]] = {}
            for entries in (old[section], run[section]):
                groups |= {kind: list(group) for kind, group in groupby(entries, of_kind)}
            old[section] = [entry for group in groups.values() for entry in group]
            again = {(section, of_kind(entry)): old["limits"][-1] for entry in run[section]}
            old["limits_of"].update(again)
        old["skipped"] = old.get("skipped", []) + run.get("skipped", [])
    return list(found.values())
