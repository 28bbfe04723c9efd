"""Peak memory against the number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, DASHES, MARKERS, new_figure

Style = tuple[str, str, str]  # colour, marker, line


def draw_memory(
    operators: Sequence[Mapping[str, Any]],
    title: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Any:
    """Peak memory against the length of the sequence, a line for each operator.

    Args:
        operators: with ``name``, ``tokens``, ``peak_mib`` and optionally ``label``, the display
            name, and ``mode``: each mode has a panel. Those without a figure are left out.
        title: above everything.
        styles: by ``name``, where lines look like those of another figure.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    drawn: dict[str, Style] = {}
    for entry in operators:
        if entry.get("peak_mib"):
            lines = panels.setdefault(entry.get("mode", ""), {})
            name = entry.get("label", entry["name"])
            lines.setdefault(name, []).append((entry["tokens"], entry["peak_mib"]))
            i = len(drawn)
            usual = COLOURS[i % 7], MARKERS[i % 7], DASHES[i % 4]
            drawn.setdefault(name, (styles or {}).get(entry["name"], usual))
    if not panels:
        raise ValueError("no entry under 'operator' has a peak_mib; nothing to draw")
    figure = new_figure(1.4 + 4.6 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (mode, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            style = dict(zip(("color", "marker", "ls"), drawn[name]))
            ax.plot(*zip(*sorted(points)), label=name, ms=5, mfc="none", **style)
        ax.set_xscale("log", base=2)
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        ax.set_xticks(ticks, ticks, fontsize=8)
        ax.set_yscale("log", base=2)
        ax.set_xlabel("tokens")
        ax.set_title({"train": "forward and backward"}.get(mode, mode))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("peak memory (MiB)")
    handles = max((ax.get_legend_handles_labels() for ax in axes), key=lambda pair: len(pair[1]))
    figure.legend(*handles, loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure
