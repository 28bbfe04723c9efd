"""Accuracy against the size of the image, for budgets of landmarks."""

from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, DASHES, MARKERS, new_figure


def draw_budgets(rows: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each model: lines for the budgets, their ranges over the seeds as bars.

    Args:
        rows: with ``'model'``, ``'solver'``, ``'seed'``, ``'size'`` (height and width in pixels),
            ``'budget'`` and ``'mIoU'`` in percent.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    models = list(dict.fromkeys((row["model"], row["solver"]) for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    budgets.sort(key=lambda budget: float("inf") if budget == "all" else budget)
    sizes = sorted({tuple(row["size"]) for row in rows}, key=lambda size: size[0] * size[1])
    across = min(3, len(models))
    down = -(-len(models) // across)
    figure = new_figure(0.6 + 3.4 * across, 3.8 * down)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for ax in panels[len(models) :]:
        ax.remove()
    for ax, model in zip(panels, models):
        for number, budget in enumerate(budgets):
            found = [
                [
                    row["mIoU"]
                    for row in rows
                    if (row["model"], row["solver"]) == model
                    and row["budget"] == budget
                    and tuple(row["size"]) == size
                ]
                for size in sizes
            ]
            places = [place for place, values in enumerate(found) if values]
            means = [sum(found[place]) / len(found[place]) for place in places]
            spans = [
                [mean - min(found[place]) for place, mean in zip(places, means)],
                [max(found[place]) - mean for place, mean in zip(places, means)],
            ]
            shift = 0.06 * (number - (len(budgets) - 1) / 2)
            ax.errorbar(
                [place + shift for place in places],
                means,
                spans,
                color=COLOURS[number % 7],
                linestyle=DASHES[number % 4],
                marker=MARKERS[number % 7],
                markersize=4,
                capsize=2,
                label=str(budget),
            )
        ax.set_title(model[0] if model[1] == "none" else f"{model[0]}, {model[1]}", fontsize=10)
        ax.set_xticks(range(len(sizes)), [f"{height} x {width}" for height, width in sizes])
        ax.set_xlim(-0.4, len(sizes) - 0.6)
        ax.tick_params(axis="x", labelrotation=20)
        ax.set_xlabel("image (pixels)")
        ax.grid(alpha=0.3)
    for ax in panels[: len(models) : across]:
        ax.set_ylabel("mIoU (%)")
    shown: dict[str, Any] = {}
    for ax in panels[: len(models)]:
        handles, labels = ax.get_legend_handles_labels()
        shown |= dict(zip(labels, handles))
    legend = [shown[str(budget)] for budget in budgets]
    panels[len(models) - 1].legend(
        legend, map(str, budgets), title="landmarks at most", frameon=False, fontsize=8
    )
    return figure
