"""Curves of training runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, DASHES, MARKERS, new_figure

Curve = Sequence[tuple[float, float]]


def draw_learning(runs: Mapping[str, Mapping[str, Mapping[str, Sequence[Curve]]]]) -> Any:
    """Training loss and, where there is one, validation accuracy, one row of panels for each task.

    Args:
        runs: task -> label -> ``'loss'`` and perhaps ``'accuracy'`` -> of each seed the curve,
            pairs of iteration and value. Seeds share a colour.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("there are no runs to draw")
    labels = list(dict.fromkeys(label for task in runs.values() for label in task))
    figure = new_figure(7.2, 0.6 + 2.2 * len(runs))
    axes = dict(loss="training loss", accuracy="validation accuracy (%)")
    there = {kind for task in runs.values() for curves in task.values() for kind in curves}
    kinds = [(kind, axis) for kind, axis in axes.items() if kind in there]
    panels = figure.subplots(len(runs), len(kinds), squeeze=False)
    for row, (task, lines) in zip(panels, runs.items()):
        for ax, (kind, axis) in zip(row, kinds):
            for label, curves in lines.items():
                number = labels.index(label)
                style = dict(color=COLOURS[number % 7], linestyle=DASHES[number // 7 % 4])
                for seed, curve in enumerate(curves[kind]):
                    x, y = zip(*curve) if curve else ((), ())
                    marker = MARKERS[number % 7] if kind == "accuracy" else None
                    name = label if seed == 0 else None
                    ax.plot(x, y, marker=marker, markersize=4, label=name, linewidth=1, **style)
            ax.set_title(task, fontsize=10)
            ax.set_xlabel("iteration")
            ax.set_ylabel(axis)
            ax.grid(alpha=0.3)
        row[-1].legend(framealpha=0.9, fontsize=8)  # curves may pass behind it
    return figure
