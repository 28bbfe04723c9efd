"""Curves of training runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .style import COLOURS, DASHES, MARKERS, new_figure

Curve = Sequence[tuple[float, float]]


def draw_learning(runs: Mapping[str, Mapping[str, Mapping[str, Sequence[Curve]]]]) -> Any:
    """Training loss and, where there is one, validation accuracy, one row of panels for each task.

    Args:
        runs: task -> label -> ``'loss'`` and perhaps ``'accuracy'`` -> of each seed the curve,
            pairs of iteration and value. Seeds are drawn as their mean and range, or one by one
            where they are not of the same iterations.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("there are no runs to draw")
    labels = list(dict.fromkeys(label for task in runs.values() for label in task))
    figure = new_figure(7.2, 1.2 + 2.4 * len(runs))
    from matplotlib.ticker import LogLocator, NullLocator

    axes = dict(loss="training loss", accuracy="validation accuracy (%)")
    there = {kind for task in runs.values() for curves in task.values() for kind in curves}
    kinds = [(kind, axis) for kind, axis in axes.items() if kind in there]
    panels = figure.subplots(len(runs), len(kinds), squeeze=False)
    for row, (task, lines) in zip(panels, runs.items()):
        for ax, (kind, axis) in zip(row, kinds):
            for label, curves in lines.items():
                number = labels.index(label)
                style = dict(color=COLOURS[number % 7], linestyle=DASHES[number // 7 % 4])
                style |= dict(marker=MARKERS[number % 7]) if kind == "accuracy" else {}
                _draw(ax, curves[kind], label, style)
            ax.set_title(task, fontsize=10)
            ax.set_xlabel("iteration")
            ax.set_ylabel(axis)
            if kind == "loss":
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for ax in panels.flat:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    shown = [label for label in labels if label in handles]
    for columns in (3, 2, 1):  # as many as fit
        legend = figure.legend(
            [handles[label] for label in shown], shown, loc="outside lower center", ncols=columns,
            frameon=False, fontsize=8,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return figure


def _draw(ax: Any, curves: Sequence[Curve], label: str, style: Mapping[str, Any]) -> None:
    """The mean of the seeds and their range; each seed where iterations differ."""
    known = [curve for curve in curves if curve]
    if len({tuple(x for x, _ in curve) for curve in known}) == 1 and len(known) > 1:
        x = [x for x, _ in known[0]]
        values = np.array([[y for _, y in curve] for curve in known])
        ax.plot(x, values.mean(0), markersize=4, label=label, linewidth=1, **style)
        ax.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.2, lw=0)
        return
    for number, curve in enumerate(known):
        name = label if number == 0 else None
        ax.plot(*zip(*curve), markersize=4, label=name, linewidth=1, **style)
