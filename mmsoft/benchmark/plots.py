"""Plots of a run; matplotlib is imported when the first is drawn."""

import io
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmsoft.benchmark.cases import published
from mmsoft.benchmark.report import SECTIONS, Entry, label_of, number, of_kind, size_of
from mmsoft.fileio import write_whole
from mmsoft.visualization import draw_memory, draw_tradeoff, save_figure
from mmsoft.visualization.style import COLOURS, new_figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, _ = COLOURS
GREY = "#7F7F7F"
STYLES = {  # colour, marker, line
    "softpp": (BLUE, "o", "-"),
    "softmax": (VERMILLION, "s", "--"),
    "linformer": (ORANGE, "^", "-."),
    "performer": (GREEN, "D", ":"),
    "nystromformer": (PURPLE, "v", "--"),
    "gaussian": (SKY, "P", "-."),
    "none": (GREY, "X", ":"),
    "softpp-tiny": (BLUE, "o", "-"),
    "softpp-small": (VERMILLION, "s", "--"),
    "softpp-tiny-max-keys-none": (SKY, "^", ":"),
}


def _colour(backbone: str) -> str:
    if backbone.startswith("softpp"):
        return SKY if backbone.endswith("newton") else BLUE
    return ORANGE if backbone.startswith("released") else GREY


def _bars(axis: Any, entries: Sequence[Entry], key: str, unit: str) -> None:
    """Horizontal bars from fast to slow, on a logarithmic axis, with their values."""
    entries = sorted((e for e in entries if e.get(key)), key=lambda e: -e[key])
    values = [entry[key] for entry in entries]
    colours = [_colour(entry["backbone"]) for entry in entries]
    bars = axis.barh([label_of(entry) for entry in entries], values, color=colours)
    axis.bar_label(bars, [number(value) for value in values], padding=3, fontsize=8)
    axis.set(xlabel=f"{unit}, logarithmic", xscale="log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    if values:
        axis.set_xlim(min(values) / 2, max(values) * 2.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def draw_backbones(entries: Sequence[Entry]) -> Any:
    """Time and memory of one device and dtype: a row of panels per size and mode."""
    groups = [list(group) for _, group in groupby(entries, of_kind)]
    heights = [0.24 * len(group) + 1 for group in groups]
    figure = new_figure(12, sum(heights))
    axes = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw=dict(height_ratios=heights))
    for row, group in zip(axes, groups):
        first = group[0]
        words = f"{size_of(first)}, batch {first['batch']}, {first['mode']}"
        panels = (("median_ms", "ms", "time"), ("peak_mib", "MiB", "memory"))
        for axis, (key, unit, what) in zip(row, panels):
            axis.set_title(f"{words}: {what}", fontsize=10)
            _bars(axis, group, key, unit)
    from matplotlib.patches import Patch

    kinds = {BLUE: "SOFT++ (ours)", SKY: "ours, Newton-Raphson", ORANGE: "released algorithm"}
    kinds[GREY] = "other backbones"
    handles = [Patch(color=colour, label=name) for colour, name in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncol=4, frameon=False)
    return figure


def _lines(axis: Any, entries: Sequence[Entry], x: Callable, y: Callable, key: str) -> None:
    for name in dict.fromkeys(entry[key] for entry in entries):
        mine = [entry for entry in entries if entry[key] == name and y(entry)]
        style = dict(zip(("color", "marker", "linestyle"), STYLES[name]))
        label = label_of(mine[0]) if mine else name
        axis.plot([*map(x, mine)], [*map(y, mine)], label=label, **style)
    axis.grid(alpha=0.3, which="both")


def draw_scaling(entries: Sequence[Entry]) -> Any:
    """Time per pixel and memory per pixel against the number of pixels: flat is linear."""
    figure = new_figure(11, 4.2)

    def pixels(entry: Entry) -> float:
        return entry["size"][0] * entry["size"][1] * entry["batch"]

    panels = (
        ("median_ms", 1e3, "time per pixel (µs)"),
        ("peak_mib", 1024, "peak memory per pixel (KiB)"),
    )
    names = {pixels(entry): size_of(entry) for entry in entries}
    for axis, (key, scale, words) in zip(figure.subplots(1, 2), panels):

        def per_pixel(entry: Entry, key: str = key, scale: float = scale) -> float | None:
            return entry[key] and scale * entry[key] / pixels(entry)

        _lines(axis, entries, pixels, per_pixel, "backbone")
        axis.set(xscale="log", xlabel="image size", ylabel=words, title=words)
        axis.set_ylim(0, 1.3 * axis.dataLim.y1)
        axis.set_xticks(sorted(names), [names[tick] for tick in sorted(names)])
        axis.minorticks_off()
        axis.legend(loc="upper right", ncol=2)
    return figure


def draw_tokens(entries: Sequence[Entry]) -> Any:
    """Time of attention layers, or of sequence models, against the number of tokens."""
    modes = list(dict.fromkeys(entry["mode"] for entry in entries))
    figure = new_figure(5.5 * len(modes), 3.9)
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    for mode, axis in zip(modes, axes):
        mine = [entry for entry in entries if entry["mode"] == mode]
        _lines(axis, mine, lambda e: e["tokens"], lambda e: e["median_ms"], "name")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time (ms)")
        axis.set_title("forward" if mode == "forward" else "forward and backward")
    axes[0].legend()
    return figure


def draw_whole(entries: Sequence[Entry]) -> Any:
    """Images per second of the detectors and segmentors."""
    groups = [list(group) for _, group in groupby(entries, of_kind)]
    figure = new_figure(5.5 * len(groups), 3.2)
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        values = [entry["images_per_second"] for entry in group]
        colours = [_colour(entry["backbone"]) for entry in group]
        bars = axis.bar([label_of(entry) for entry in group], values, color=colours)
        axis.bar_label(bars, [number(value) for value in values], padding=2)
        first = group[0]
        title = f"{first['task']}, {size_of(first)}, {first['dtype']}"
        axis.set(title=title, ylabel="images per second", ylim=(0, 1.15 * max(values)))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Write a PNG; 64 colours make it a third of the size."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    with write_whole(path) as partial:
        Image.open(buffer).convert("RGB").quantize(64).save(partial, optimize=True)


def _variant(entry: Entry) -> str:
    return "_".join([entry["device"], entry["dtype"], *["compiled"] * entry["compiled"]])


def plot(data: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, list[str]]:
    """Draw what a run measured; returns the names of the files of each section."""
    names: dict[str, list[str]] = {section: [] for section in SECTIONS}
    by_variant = sorted(data["results"], key=lambda e: (_variant(e), *of_kind(e)))
    for variant, entries in groupby(by_variant, _variant):
        names["results"].append(f"{prefix}backbones_{variant}.png")
        _save(draw_backbones(list(entries)), folder / names["results"][-1])
    for section, draw in dict(
        scaling=draw_scaling, whole=draw_whole, operator=draw_tokens, sequence=draw_tokens
    ).items():
        if data[section]:
            names[section].append(f"{prefix}{section}.png")
            _save(draw(data[section]), folder / names[section][-1])
    for section, path in plot_as_papers(data, folder, prefix).items():
        names[section].append(path.name)
    return names


def forward_passes(data: dict[str, Any]) -> list[Entry]:
    """The counted forward passes of one size, batch and dtype: those of most backbones."""
    counted = [e for e in data["results"] if e["mode"] == "forward" and e.get("params_m")]
    return max((list(group) for _, group in groupby(counted, of_kind)), key=len, default=[])


def plot_as_papers(data: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Draw the papers' figures for which a run has entries.

    ``memory.png`` (SOFT, figure 1): memory against tokens. ``tradeoff.png`` (figure 3): throughput
    as measured, against accuracy as the papers state it; none was measured here. Returns the file
    of each section, ``operator`` (``sequence`` likewise, ``sequence_memory.png``) and ``results``.
    """
    written = {}
    for section, what, name in (
        ("operator", "one attention layer", "memory.png"),
        ("sequence", "a small model of sequences", "sequence_memory.png"),
    ):
        entries = [entry for entry in data[section] if entry["peak_mib"]]
        if entries:
            entries = [e for e in entries if e["dtype"] == entries[0]["dtype"]]
            figure = draw_memory(entries, title=f"Memory of {what}, {data['device']}")
            written[section] = save_figure(figure, folder / f"{prefix}{name}")
    passes, accuracies = forward_passes(data), published()
    if any(entry["backbone"] in accuracies for entry in passes):
        first = passes[0]
        title = f"{data['device']}, {size_of(first)}, batch {first['batch']}, {data['date'][:10]}"
        figure = draw_tradeoff(
            [{**entry, "label": label_of(entry)} for entry in passes], accuracies, title=title
        )
        written["results"] = save_figure(figure, folder / f"{prefix}tradeoff.png")
    return written
