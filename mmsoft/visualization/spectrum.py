"""Eigenvalues of ``A`` with the filter of its inverse."""

from typing import Any

import numpy as np

from .style import COLOURS, new_figure


def draw_spectrum(
    eigenvalues: np.ndarray, x: np.ndarray, filters: np.ndarray, title: str = ""
) -> Any:
    """The spectrum of ``A`` with the filter ``g`` of its inverse.

    Args:
        eigenvalues: of every head, ``[heads, m]``.
        x: where the filter was evaluated, positive, ``[n]``.
        filters: ``g(x)`` of every head, ``[heads, n]``.
        title: above everything.

    Returns:
        A matplotlib figure. Above: how many eigenvalues there are, and the share ``x g(x)`` of each
        that survives ``A A^+``: 1 where it is inverted, 0 where it is damped. Below: ``g`` and
        ``1/x``.
    """
    figure = new_figure(6.4, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    floor = float(x.min())
    counted = np.clip(np.asarray(eigenvalues, float).ravel(), floor, None)
    bins = np.geomspace(floor, float(x.max()), 41)
    heads = len(filters)
    upper.hist(counted, bins=bins, color="0.75", edgecolor="0.5", lw=0.5)
    upper.set_ylabel(f"eigenvalues\n({heads} head{'s' if heads > 1 else ''})")
    kept = upper.twinx()
    for g in filters:
        kept.plot(x, x * g, color=COLOURS[0], lw=1.5)
        lower.plot(x, g, color=COLOURS[0], lw=1.5)
    kept.set_ylim(0, 1.08)
    kept.set_ylabel(r"share inverted, $\lambda\,g(\lambda)$", color=COLOURS[0])
    lower.plot([], [], color=COLOURS[0], lw=1.5, label=r"filter $g(\lambda)$")
    lower.plot(x, 1 / x, "--", color=COLOURS[1], lw=1.5, label=r"exact inverse $1/\lambda$")
    lower.set_xscale("log")
    lower.set_yscale("log")
    top = 3 * float(filters.max())
    lower.set_ylim(max(float(filters.min()), top * 1e-5), top)
    lower.set_xlabel(r"eigenvalue $\lambda$ of $A$")
    lower.set_ylabel(r"$g(\lambda)$")
    lower.legend(frameon=False)
    lower.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    return figure
