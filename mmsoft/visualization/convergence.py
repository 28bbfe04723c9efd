"""Residuals of the Newton-Raphson inverse against its steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .style import COLOURS, DASHES, MARKERS, new_figure

BAND = (0.1, 0.9)  # quantiles


def draw_convergence(
    residuals: Mapping[str, Mapping[str, np.ndarray]], norm: str = "2", title: str = ""
) -> Any:
    """Residual of the Newton-Raphson inverse against its steps: mean, and band of 10 % to 90 %.

    Args:
        residuals: by stage and then by step rule, ``[steps + 1, n]``.
        norm: that of the residual, for the label.
        title: above everything.

    Returns:
        A matplotlib figure, one panel for each stage.
    """
    figure = new_figure(0.6 + 3.4 * len(residuals), 3.6)
    axes = figure.subplots(1, len(residuals), sharey=True, squeeze=False)[0]
    for ax, (stage, rules) in zip(axes, residuals.items()):
        for i, (rule, values) in enumerate(rules.items()):
            values = np.asarray(values, float)
            finite = np.where(np.isfinite(values), values, np.nan)
            steps = np.arange(len(values))
            low, high = np.nanquantile(finite, BAND, axis=1)
            ax.fill_between(steps, low, high, color=COLOURS[i], alpha=0.2, lw=0)
            style = dict(color=COLOURS[i], marker=MARKERS[i], ms=4, markevery=2)
            ax.plot(steps, np.nanmean(finite, axis=1), DASHES[i], label=rule, **style)
        ax.set_yscale("log")
        ax.set_title(stage)
        ax.set_xlabel("Newton-Raphson step k")
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    p = "F" if norm == "fro" else norm
    axes[0].set_ylabel(rf"$\|A A_k A - A\|_{p}\ /\ \|A\|_2$")
    axes[0].legend(title="step rule", frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
