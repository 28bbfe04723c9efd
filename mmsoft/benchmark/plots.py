"""Plots of a run; matplotlib is imported when the first is drawn."""

import io
import re
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from mmsoft.benchmark.cases import BACKBONES, CHANNELS_LAST, LANDMARKS, published
from mmsoft.benchmark.report import (
    SECTIONS,
    Entry,
    at_best,
    label_of,
    landmarks_of,
    number,
    of_kind,
    size_of,
)
from mmsoft.fileio import write_whole
from mmsoft.visualization import draw_memory, draw_tradeoff
from mmsoft.visualization.style import COLOURS, GREY, new_figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS
DPI = 200
INTERVALS = "points: medians; lines: from the minimum to the 90 % quantile"
STYLES = {  # colour, marker, line
    "softpp": (BLUE, "o", "-"),
    "softmax": (VERMILLION, "s", "--"),
    "softmax-materialised": (BLACK, "X", ":"),
    "linformer": (ORANGE, "^", "-."),
    "performer": (GREEN, "D", ":"),
    "nystromformer": (PURPLE, "v", "--"),
    "softpp-256": (BLUE, "o", ":"),
    "nystromformer-49": (PURPLE, "v", ":"),
    "gaussian": (SKY, "P", "-."),
    "none": (GREY, "X", ":"),
    "softpp-tiny": (BLUE, "o", "-"),
    "softpp-small": (VERMILLION, "s", "--"),
    "softpp-tiny-max-keys-none": (SKY, "^", ":"),
}


def _colour(backbone: str) -> str:
    if backbone.startswith("softpp"):
        return GREEN if backbone.endswith("newton") else BLUE
    return VERMILLION if backbone.startswith("released") else GREY


def _logarithmic(axis: Any, factors: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks at so many times powers of ten, as numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(10, factors))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _interval(entry: Entry, key: str) -> tuple[float, float, float]:
    """The least, the median and the 90 % quantile of the times; of memory there is one value."""
    if key == "median_ms":
        return entry["min_ms"], entry["median_ms"], entry["q90_ms"]
    return (entry[key],) * 3


def draw_backbones(entries: Sequence[Entry], landmarks: str) -> Any:
    """Time and memory of one device and dtype: a column for each size and mode."""
    groups = [list(group) for _, group in groupby(entries, of_kind)]
    names = {_base(entry) for entry in entries}
    ordered = [
        name
        for arch in ("tiny", "small", "medium", "large")
        for name in BACKBONES
        if BACKBONES[name].ours == f"softpp-{arch}" and name in names
    ]
    rows = {name: row for row, name in enumerate([*ordered, *sorted(names - {*ordered})])}
    edges = [
        rows[name] - 0.5
        for before, name in pairwise(ordered)
        if BACKBONES[name].ours != BACKBONES[before].ours
    ]
    figure = new_figure(max(8.5, 2.1 + 2.5 * len(groups)), 2 + 0.36 * len(rows))
    panels = (("median_ms", "ms"), ("peak_mib", "peak MiB"))
    grid = figure.subplots(2, len(groups), sharey=True, squeeze=False)
    for axes, (key, unit) in zip(grid, panels):
        for axis, group in zip(axes, groups):
            _points(axis, [entry for entry in group if entry.get(key)], key, rows)
            axis.set_xlabel(f"{unit}, logarithmic", fontsize=9)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_yticks([*rows.values()], [_name(name) for name in rows], fontsize=7.5)
            axis.tick_params(axis="y", length=0)
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.hlines(edges, *axis.get_xlim(), color="#AAAAAA", lw=0.8)
            axis.grid(alpha=0.25)
            axis.set_axisbelow(True)
    for axis, (first, *_) in zip(grid[0], groups):
        mode = "" if first["mode"] == "forward" else "\nforward and backward"
        axis.set_title(f"{size_of(first)}, batch {first['batch']}{mode}", fontsize=9)
    from matplotlib.lines import Line2D

    kinds = {BLUE: f"SOFT++ (ours), at most 49 landmarks, {landmarks}"}
    if any(name.endswith("newton") for name in names):
        kinds[GREEN] = "ours, at most 49 released landmarks, Newton-Raphson"
    if any(name.startswith("released") for name in names):
        kinds[VERMILLION] = "released algorithm, a landmark for 32x32 pixels (1050 at 800x1344)"
    style: dict[str, Any] = dict(marker="o", ms=4, lw=1.2)
    handles = [Line2D([], [], color=colour, label=name, **style) for colour, name in kinds.items()]
    handles.append(Line2D([], [], color=GREY, label="other backbones", **style))
    style |= dict(marker="s", mfc="white", color=GREY)
    handles.append(Line2D([], [], label="other backbones, channels-last", **style))
    figure.legend(
        handles=handles, loc="outside lower center", ncol=2, frameon=False, fontsize=8,
        title=f"{INTERVALS[0].upper()}{INTERVALS[1:]}; numbers: the lesser of a row's points.",
        title_fontsize=8,
    )  # fmt: skip
    first = entries[0]
    words = " under autocast" * (first["dtype"] == "bfloat16") + ", compiled" * first["compiled"]
    title = f"{first['device'].upper()}, {first['dtype']}{words}; ours above peers of their size"
    figure.suptitle(title, fontsize=10)
    return figure


def _base(entry: Entry) -> str:
    return entry["backbone"].removesuffix(CHANNELS_LAST)


def _points(axis: Any, entries: Sequence[Entry], key: str, rows: dict[str, int]) -> None:
    """Points with intervals, each backbone in its row, on a logarithmic axis."""
    axis.set_xscale("log")
    kinds: dict[tuple[str, bool], list[Entry]] = {}
    for entry in entries:
        kind = _colour(_base(entry)), entry["backbone"] != _base(entry)
        kinds.setdefault(kind, []).append(entry)
    for (colour, last), mine in kinds.items():
        at = [rows[_base(entry)] for entry in mine]
        low, middle, high = zip(*(_interval(entry, key) for entry in mine))
        axis.hlines(at, low, high, color=colour, lw=1.2)
        face = "white" if last else colour
        axis.plot(middle, at, ls="", marker="s" if last else "o", ms=4, color=colour, mfc=face)
    for name, y in rows.items():
        mine = [entry for entry in entries if _base(entry) == name]
        if mine:
            value, end = min(e[key] for e in mine), min(_interval(e, key)[0] for e in mine)
            where: dict[str, Any] = dict(xytext=(-5, 0), textcoords="offset points", va="center")
            axis.annotate(number(value), (end, y), ha="right", fontsize=6.5, **where)
    if entries:
        low, high = (end(entry[key] for entry in entries) for end in (min, max))
        _logarithmic(axis.xaxis, (1, 2, 5) if high < 30 * low else (1,))
        axis.set_xlim(low / max(1.3, (high / low) ** 0.25), high * 1.3)


def _name(backbone: str) -> str:
    return BACKBONES[backbone].label if backbone in BACKBONES else backbone


def _lines(axis: Any, entries: Sequence[Entry], x: Callable, y: Callable, key: str) -> None:
    """A line for each name through the medians, which ``y`` scales, with intervals."""
    for name in dict.fromkeys(entry[key] for entry in entries):
        mine = [entry for entry in entries if entry[key] == name and y(entry)]
        if not mine:
            continue
        style: dict[str, Any] = dict(zip(("color", "marker", "linestyle"), STYLES[name]))
        low, middle, high = zip(*map(y, mine))
        spans = [[m - a for a, m in zip(low, middle)], [b - m for m, b in zip(middle, high)]]
        style |= dict(ms=5, capsize=2, elinewidth=1)
        axis.errorbar([*map(x, mine)], middle, spans, label=_legend(mine[0]), **style)
    axis.grid(alpha=0.3, which="both")


def _legend(entry: Entry) -> str:
    label = label_of(entry)
    if "tokens" in entry:
        return label
    label = f"{label}, at most 49 landmarks"
    return label if "max_keys" in label else f"{label}, default max_keys=2048"


def draw_scaling(entries: Sequence[Entry], landmarks: str) -> Any:
    """Time per pixel and memory per pixel against the number of pixels: flat is linear."""
    figure = new_figure(10, 4.2)

    def pixels(entry: Entry) -> float:
        return entry["size"][0] * entry["size"][1] * entry["batch"]

    panels = (
        ("median_ms", 1e3, "time per pixel (µs)"),
        ("peak_mib", 1024, "peak memory per pixel (KiB)"),
    )
    names = {pixels(entry): size_of(entry) for entry in entries}
    for axis, (key, scale, words) in zip(figure.subplots(1, 2), panels):

        def per_pixel(entry: Entry, key: str = key, scale: float = scale) -> Any:
            if not entry[key]:
                return None
            return tuple(scale * value / pixels(entry) for value in _interval(entry, key))

        _lines(axis, entries, pixels, per_pixel, "backbone")
        axis.set(xscale="log", xlabel="image size", ylabel=words)
        axis.set_ylim(0, 1.45 * axis.dataLim.y1)
        axis.set_xticks(sorted(names), [names[tick] for tick in sorted(names)])
        axis.minorticks_off()
    figure.axes[0].legend(loc="upper left", fontsize=8, frameon=False)
    title = f"Landmarks {landmarks}. Flat is linear; {INTERVALS}"
    figure.suptitle(title, fontsize=9)
    return figure


def draw_tokens(entries: Sequence[Entry]) -> Any:
    """Time of attention layers, or of sequence models, against the number of tokens."""
    modes = list(dict.fromkeys(entry["mode"] for entry in entries))
    figure = new_figure(4.8 * len(modes), 4.2)
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    for mode, axis in zip(modes, axes):
        mine = [entry for entry in entries if entry["mode"] == mode]
        _lines(axis, mine, lambda e: e["tokens"], lambda e: _interval(e, "median_ms"), "name")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time (ms)")
        ticks = sorted({entry["tokens"] for entry in mine})
        axis.set_xticks(ticks, ticks, fontsize=8)
        axis.minorticks_off()
        _logarithmic(axis.yaxis)
        axis.set_title("forward" if mode == "forward" else "forward and backward")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    figure.suptitle(INTERVALS, fontsize=9)
    return figure


def draw_whole(entries: Sequence[Entry], landmarks: str) -> Any:
    """Images per second of the detectors and segmentors."""
    groups = [list(group) for _, group in groupby(entries, of_kind)]
    figure = new_figure(3 + 2.4 * len(groups), 2.8)
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for y, entry in enumerate(group):
            colour = _colour(entry["backbone"])
            slow, middle, fast = (
                1e3 * entry["batch"] / entry[key] for key in ("q90_ms", "median_ms", "min_ms")
            )
            axis.plot((slow, fast), (y, y), color=colour, lw=1.5)
            axis.plot(middle, y, color=colour, marker="o", ms=5, ls="")
            where = dict(xytext=(0, 5), textcoords="offset points", ha="center")
            axis.annotate(number(middle), (middle, y), fontsize=8, **where)
        first = group[0]
        words = f"{first['task']}, {size_of(first)}"
        axis.set_title(words + f"\n{first['dtype']}" * (first["dtype"] != "float32"), fontsize=9)
        axis.set_xlabel("images/s", fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.set_xlim(0, 1.2 * max(1e3 * e["batch"] / e["min_ms"] for e in group))
        ours = [", ≤ 49 landmarks" * entry["backbone"].startswith("softpp") for entry in group]
        labels = [label_of(entry) + words for entry, words in zip(group, ours)]
        axis.set_yticks(range(len(group)), labels if axis is figure.axes[0] else [""] * len(group))
        axis.set_ylim(len(group) - 0.5, -0.7)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    title = (
        f"Landmarks {landmarks}; points: medians; lines: 90 % quantile of the time to its minimum"
    )
    figure.suptitle(title, fontsize=9)
    return figure


def _short(tag: re.Match) -> str:
    """A tag with its coordinates to a tenth of a point."""
    return re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", tag[0])


def _save(figure: Any, path: Path, commit: str | None = None) -> Path:
    """Write a PNG, of 64 colours, which make it a third of the size, and an SVG beside it."""
    from matplotlib import rc_context
    from PIL import Image

    if commit:
        figure.text(0.998, 0.003, f"commit {commit}", ha="right", fontsize=6, color=GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    with write_whole(path) as partial:
        Image.open(buffer).convert("RGB").quantize(64).save(partial, optimize=True)
    # Text stays text, the same numbers give the same file, and nothing is longer than it needs.
    style = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.sans-serif": ["DejaVu Sans"]}
    drawing = io.StringIO()
    with rc_context(style):
        figure.savefig(drawing, format="svg", metadata=dict(Date=None))
    short = re.sub(r"<[^>]*>", _short, drawing.getvalue())  # what is drawn, not what is written
    short = re.sub(r"\n +|(?<=\d) \n", "\n", re.sub(r' transform="rotate\(-0 [^"]*"', "", short))
    with write_whole(path.with_suffix(".svg")) as partial:
        partial.write_text(short)
    return path


def _variant(entry: Entry) -> str:
    return "_".join([entry["device"], entry["dtype"], *["compiled"] * entry["compiled"]])


def plot(data: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, list[str]]:
    """Draw what a run measured; returns the names of the PNG files of each section.

    Each has an SVG beside it.
    """
    names: dict[str, list[str]] = {section: [] for section in SECTIONS}
    landmarks, commit = landmarks_of(data), data.get("commit")
    results = [entry for entry in data["results"] if entry["backbone"] not in LANDMARKS]
    by_variant = sorted(results, key=lambda e: (_variant(e), *of_kind(e)))
    for variant, entries in groupby(by_variant, _variant):
        names["results"].append(f"{prefix}backbones_{variant}.png")
        _save(draw_backbones(list(entries), landmarks), folder / names["results"][-1], commit)
    for section, draw in dict(
        scaling=lambda entries: draw_scaling(entries, landmarks),
        whole=lambda entries: draw_whole(entries, landmarks),
        operator=draw_tokens,
        sequence=draw_tokens,
    ).items():
        if data[section]:
            names[section].append(f"{prefix}{section}.png")
            _save(draw(data[section]), folder / names[section][-1], commit)
    for section, path in plot_as_papers(data, folder, prefix).items():
        names[section].append(path.name)
    return names


def forward_passes(data: dict[str, Any]) -> list[Entry]:
    """The counted forward passes of one size, batch and dtype, those of most backbones.

    Of each backbone in its faster memory format.
    """
    counted = [e for e in data["results"] if e["mode"] == "forward" and e.get("params_m")]
    counted = [e for e in counted if e["backbone"] not in LANDMARKS]
    group = max((list(group) for _, group in groupby(counted, of_kind)), key=len, default=[])
    found: list[Entry] = []
    for name in dict.fromkeys(map(_base, group)):
        best = at_best(name, group)
        assert best is not None
        found.append({**best, "backbone": name})
    return found


def plot_as_papers(data: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Draw the papers' figures for which a run has entries.

    ``memory.png`` (SOFT, figure 1): memory against tokens. ``tradeoff.png`` (figure 3): throughput
    as measured, against accuracy as the papers state it; none was measured here. Returns the file
    of each section, ``operator`` (``sequence`` likewise, ``sequence_memory.png``) and ``results``;
    each has an SVG beside it.
    """
    written = {}
    for section, what, name in (
        ("operator", "one attention layer", "memory.png"),
        ("sequence", "a small model of sequences", "sequence_memory.png"),
    ):
        entries = [entry for entry in data[section] if entry["peak_mib"]]
        if entries:
            entries = [e for e in entries if e["dtype"] == entries[0]["dtype"]]
            title = f"Peak memory of {what}, {data['device']}"
            figure = draw_memory(entries, title, STYLES)
            written[section] = _save(figure, folder / f"{prefix}{name}", data.get("commit"))
    passes, accuracies = forward_passes(data), published()
    if any(entry["backbone"] in accuracies for entry in passes):
        first = passes[0]
        title = (
            f"{data['device']}, {size_of(first)}, batch {first['batch']}, {data['date'][:10]}\n"
            f"SOFT++: speed with at most 49 landmarks, {landmarks_of(data)}; "
            "accuracy of the released weights, Newton"
        )
        figure = draw_tradeoff(
            [{**entry, "label": label_of(entry)} for entry in passes], accuracies, title=title
        )
        path = folder / f"{prefix}tradeoff.png"
        written["results"] = _save(figure, path, data.get("commit"))
    return written
