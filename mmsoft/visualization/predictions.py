"""Predictions over the image: boxes, classes of pixels, or scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .style import COLOURS, frame, grey, new_figure


def draw_predictions(picture: np.ndarray, found: Mapping[str, Any], title: str = "") -> Any:
    """What a model says of an image.

    Args:
        picture: RGB ``[H, W, 3]``, 8 bits.
        found: ``kind`` is ``'boxes'`` (with ``boxes [n, 4]``, ``labels``, ``scores``),
            ``'classes'`` (with ``map [H, W]``) or ``'scores'`` (with ``labels``, ``scores``);
            ``names`` of the classes, or ``None`` for their numbers.
        title: above everything.

    Returns:
        A matplotlib figure.
    """
    aspect = picture.shape[0] / picture.shape[1]
    figure = new_figure(7.0, 6.2 * aspect + 0.8)
    axes = figure.subplots()
    names = found.get("names")

    def name(label: int) -> str:
        return names[label] if names and label < len(names) else str(label)

    axes.imshow(picture)
    if found["kind"] == "boxes":
        for (left, top, right, bottom), label, score in zip(
            np.asarray(found["boxes"]), np.asarray(found["labels"]), np.asarray(found["scores"])
        ):
            colour = COLOURS[int(label) % len(COLOURS)]
            axes.plot(
                [left, right, right, left, left], [top, top, bottom, bottom, top], color=colour
            )
            axes.text(
                left,
                top,
                f"{name(int(label))} {score:.2f}",
                fontsize=8,
                color="white",
                backgroundcolor=colour,
            )
    elif found["kind"] == "classes":
        classes = np.asarray(found["map"])
        palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS]) / 255
        axes.imshow(0.4 * grey(picture) + 0.6 * palette[classes % len(COLOURS)])
        for label in np.unique(classes):
            axes.plot([], [], "s", color=COLOURS[int(label) % len(COLOURS)], label=name(int(label)))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    else:
        best = zip(np.asarray(found["labels"]), np.asarray(found["scores"]))
        axes.set_xlabel("   ".join(f"{name(int(label))} {score:.2f}" for label, score in best))
    frame(axes, picture)
    figure.suptitle(title, fontsize=11)
    return figure
