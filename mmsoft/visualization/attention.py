"""Heat maps of attention over the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .style import Extent, frame, grey, new_figure


def draw_attention(
    picture: np.ndarray,
    queries: Sequence[tuple[float, float]],
    maps: Mapping[str, np.ndarray],
    extent: Extent,
    title: str = "",
) -> Any:
    """A contact sheet of attention: a row for each query, a column for each map.

    Every map is painted from 0 to its own largest value, which its title states with the smallest;
    negative entries are painted as 0.

    Args:
        picture: RGB ``[H, W, 3]``, 8 bits.
        queries: (x, y) of the chosen pixels.
        maps: by name, in the order of the columns: ``[n_queries, rows, columns]``.
        extent: left, right, bottom, top edge of the maps in pixels of the picture.
        title: above everything.

    Returns:
        A matplotlib figure.
    """
    aspect = picture.shape[0] / picture.shape[1]
    columns = len(maps) + 1
    figure = new_figure(2.1 * columns + 0.8, (1.95 * aspect + 0.42) * len(queries) + 0.8)
    axes = figure.subplots(len(queries), columns, sharex=True, sharey=True, squeeze=False)
    background = 0.35 + 0.65 * grey(picture)
    painted = None
    for row, (x, y) in enumerate(queries):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title(f"query {x:g},{y:g}", fontsize=9)
        axes[row, 0].set_ylabel("y (pixels)")
        for column, (name, values) in enumerate(maps.items(), 1):
            ax, field = axes[row, column], np.asarray(values[row], float)
            largest = float(field.max())
            share = (field / largest).clip(0, 1) if largest > 0 else np.zeros_like(field)
            ax.imshow(background)
            painted = ax.imshow(
                share, extent=extent, cmap="viridis", vmin=0, vmax=1, alpha=0.75, zorder=1
            )
            ax.set_title(f"{name}\n{field.min():.2g} to {largest:.2g}", fontsize=9)
        for ax in axes[row]:
            ax.plot(x, y, "o", ms=7, mfc="none", mec="black", mew=3)
            ax.plot(x, y, "o", ms=7, mfc="none", mec="white", mew=1.5)
            frame(ax, picture)
    for ax in axes[-1]:
        ax.set_xlabel("x (pixels)")
    if painted is not None:
        bar = figure.colorbar(painted, ax=axes[:, -1], fraction=0.08, pad=0.03)
        bar.set_label("attention / largest of the map")
    figure.suptitle(title, fontsize=11)
    return figure
