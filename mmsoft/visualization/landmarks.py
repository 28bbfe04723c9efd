"""Landmarks and the regions that they explain."""

from typing import Any

import numpy as np

from .style import Extent, frame, new_figure


def draw_landmarks(
    picture: np.ndarray,
    regions: np.ndarray,
    strength: np.ndarray,
    centres: np.ndarray,
    extent: Extent,
    title: str = "",
) -> Any:
    """Which landmark explains which region, and how well.

    Args:
        picture: RGB ``[H, W, 3]``, 8 bits.
        regions: number of the best landmark of each token, ``[rows, columns]``.
        strength: its ``K1``, in [0, 1], ``[rows, columns]``.
        centres: row and column of the landmarks in tokens, ``[m, 2]``.
        extent: left, right, bottom, top edge of the grid of tokens in pixels of the picture.
        title: above everything.

    Returns:
        A matplotlib figure.
    """
    rows, columns = regions.shape
    left, right, bottom, top = extent
    x = left + (centres[:, 1] + 0.5) / columns * (right - left)
    y = top + (centres[:, 0] + 0.5) / rows * (bottom - top)
    used = np.unique(regions)
    aspect = picture.shape[0] / picture.shape[1]
    figure = new_figure(11.2, 3.2 * aspect + 1.1)
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    axes[0].imshow(picture)
    axes[0].scatter(x, y, s=14, c="white", edgecolors="black", lw=0.8)
    axes[0].set_title(f"{len(centres)} landmarks (dots)", fontsize=10)

    # Every landmark in use has a colour; consecutive landmarks have different ones, and borders are
    # drawn too, because so many colours cannot all be distinguished.
    order = np.argsort((np.arange(len(used)) * 0.6180339887) % 1)
    shade = np.empty(len(centres))
    shade[used] = np.argsort(order) / max(len(used) - 1, 1)
    axes[1].imshow(shade[regions], extent=extent, cmap="viridis", interpolation="nearest")
    _draw_borders(axes[1], regions, extent)
    axes[1].scatter(x[used], y[used], s=14, c=shade[used], edgecolors="white", lw=0.8)
    axes[1].set_title(f"region of each landmark ({len(used)} in use)", fontsize=10)

    painted = axes[2].imshow(strength, extent=extent, cmap="cividis", vmin=0, vmax=1)
    axes[2].set_title("how well it explains it", fontsize=10)
    figure.colorbar(painted, ax=axes[2], fraction=0.05, pad=0.03).set_label(
        "largest $K_1$ (1: equal to the landmark)"
    )
    for ax in axes:
        frame(ax, picture)
        ax.set_xlabel("x (pixels)")
    axes[0].set_ylabel("y (pixels)")
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_borders(axes: Any, regions: np.ndarray, extent: Extent) -> None:
    """Lines between tokens of different regions."""
    rows, columns = regions.shape
    left, right, bottom, top = extent
    x = np.linspace(left, right, columns + 1)
    y = np.linspace(top, bottom, rows + 1)
    i, j = np.nonzero(regions[:, 1:] != regions[:, :-1])
    axes.vlines(x[j + 1], y[i], y[i + 1], colors="white", lw=0.8)
    i, j = np.nonzero(regions[1:] != regions[:-1])
    axes.hlines(y[i + 1], x[j], x[j + 1], colors="white", lw=0.8)
