"""Published accuracy against measured throughput."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .style import COLOURS, DASHES, GREY, MARKERS, new_figure

PALETTE = (*COLOURS, GREY)
SHAPES = (*MARKERS, "h")
ENDS = ("q90_ms", "min_ms")  # of the interval of a throughput


def _family(result: Mapping[str, Any]) -> tuple[str, str]:
    """A backbone's family and its size: SOFT++ and Tiny, Swin and T."""
    family, _, size = result.get("label", result["backbone"]).replace(" ", "-").rpartition("-")
    return family, size


def draw_tradeoff(
    results: Sequence[Mapping[str, Any]], accuracies: Mapping[str, float], title: str = ""
) -> Any:
    """Published accuracy against measured throughput, and against parameters.

    Args:
        results: with ``backbone``, ``images_per_second``, ``params_m`` and optionally ``label``,
            the display name, and ``median_ms``, ``min_ms``, ``q90_ms``, which give intervals. What
            comes before the last space or hyphen is the family.
        accuracies: published top-1 accuracy in percent by backbone; other backbones are left out.
        title: above everything.

    Returns:
        A matplotlib figure of two panels.

    Raises:
        ValueError: no backbone has a published accuracy.
    """
    drawn = [r for r in results if r["backbone"] in accuracies]
    if not drawn:
        raise ValueError("no backbone under 'results' has a published accuracy; nothing to draw")
    families: dict[str, list[Mapping[str, Any]]] = {}
    for result in drawn:
        family, _ = _family(result)
        families.setdefault(family, []).append(result)
    figure = new_figure(11, 5.4)
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.subplots(1, 2, sharey=True)
    panels = (("images_per_second", "throughput (images/s)"), ("params_m", "parameters (M)"))
    for ax, (key, label) in zip(axes, panels):
        for i, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda member: member[key])
            x = [member[key] for member in members]
            y = [accuracies[member["backbone"]] for member in members]
            colour = PALETTE[i % 8]
            style = dict(color=colour, marker=SHAPES[i % 8], ls=DASHES[i // 8 % 4])
            ax.plot(x, y, ms=5, lw=1.2, label=family, **style)
            if key == "images_per_second" and all("q90_ms" in member for member in members):
                # Throughput at the 90 % quantile of the time, and at its minimum.
                ends = ([b * m["median_ms"] / m[k] for b, m in zip(x, members)] for k in ENDS)
                ax.hlines(y, *ends, color=colour, lw=2.5, alpha=0.5)
        ax.set_xlabel(label)
        ax.margins(0.12)
        ax.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("ImageNet-1k top-1 (%),\nas published, not measured here")
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()  # places the axes
    for ax, (key, _) in zip(axes, panels):
        points = [(r[key], accuracies[r["backbone"]]) for r in drawn]
        colours = [PALETTE[[*families].index(_family(r)[0]) % 8] for r in drawn]
        _annotate(ax, points, [_family(r)[1] for r in drawn], colours)
    return figure


def _annotate(
    ax: Any,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    colours: Sequence[str],
) -> None:
    """Name each point where its name covers no other, no point and no line."""
    scale = ax.figure.dpi / 72  # pixels of a point of type
    centres = ax.transData.transform(points) / scale
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    for line in ax.lines:
        corners = ax.transData.transform(line.get_xydata()) / scale
        for (x0, y0), (x1, y1) in pairwise(corners):
            steps = np.linspace(0, 1, 40)
            along = zip(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0))
            taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in along]
    frame = ax.get_window_extent()
    left, right = frame.x0 / scale, frame.x1 / scale
    for (x, y), point, label, colour in zip(centres, points, labels, colours):
        half = 2.4 * len(label)
        boxes = []
        for radius in (9, 16, 24):
            for angle in np.arange(0, 2 * np.pi, np.pi / 6):
                dx, dy = (radius + half) * np.cos(angle), radius * np.sin(angle)
                boxes.append((x + dx - half, y + dy - 4, x + dx + half, y + dy + 4))

        def covered(box: tuple[float, ...]) -> float:
            """Area that others have, and what sticks out of the frame."""
            area = sum(
                max(0, min(box[2], b[2]) - max(box[0], b[0]))
                * max(0, min(box[3], b[3]) - max(box[1], b[1]))
                for b in taken
            )
            return area + 100 * (max(0, left - box[0]) + max(0, box[2] - right))

        best = min(boxes, key=covered)  # the first, and so the nearest, of those that are as good
        taken.append(best)
        offset = ((best[0] + best[2]) / 2 - x, (best[1] + best[3]) / 2 - y)
        arrow = dict(arrowstyle="-", color=colour, lw=0.5, shrinkA=0, shrinkB=3)
        ax.annotate(
            label, point, offset, textcoords="offset points", ha="center", va="center",
            fontsize=7.5, color=colour, arrowprops=arrow,
        )  # fmt: skip
