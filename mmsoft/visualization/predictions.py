"""Predictions over the image: boxes, instances, classes of pixels, or scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .style import COLOURS, frame, grey, new_figure

PALETTE = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS]) / 255


def draw_predictions(picture: np.ndarray, found: Mapping[str, Any], title: str = "") -> Any:
    """What a model says of an image.

    Args:
        picture: RGB ``[H, W, 3]``, 8 bits.
        found: ``kind`` is ``'boxes'`` (with ``boxes [n, 4]``, ``labels``, ``scores``),
            ``'instances'`` (with ``masks``, each ``[H, W]``), ``'classes'`` (with ``map [H, W]``)
            or ``'scores'`` (with ``labels``, ``scores``); ``names`` of the classes, or ``None`` for
            their numbers.
        title: above everything.

    Returns:
        A matplotlib figure.
    """
    aspect = picture.shape[0] / picture.shape[1]
    figure = new_figure(7.0, 6.2 * aspect + 0.8)
    axes = figure.subplots()
    _paint(axes, picture, found)
    if found["kind"] == "boxes":
        for (left, top, *_), label, score in zip(
            np.asarray(found["boxes"]), np.asarray(found["labels"]), np.asarray(found["scores"])
        ):
            text = f"{_name(found, label)} {score:.2f}"
            colour = COLOURS[int(label) % len(COLOURS)]
            axes.text(left, top, text, fontsize=8, color="white", backgroundcolor=colour)
    elif found["kind"] == "classes":
        _legend(axes, found, np.unique(np.asarray(found["map"])))
    elif found["kind"] == "scores":
        best = zip(np.asarray(found["labels"]), np.asarray(found["scores"]))
        axes.set_xlabel("   ".join(f"{_name(found, label)} {score:.2f}" for label, score in best))
    frame(axes, picture)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_comparison(
    rows: Sequence[tuple[np.ndarray, Mapping[str, Mapping[str, Any]], str]], width: float = 7.2
) -> Any:
    """A contact sheet: each row an image, then what the columns say of it.

    Args:
        rows: a picture, what is found in it by column (as for :func:`draw_predictions`, of one kind
            in all of them; scores are not drawn), and a line on it.
        width: inches.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there are no rows, or their columns differ.
    """
    if not rows or len({tuple(columns) for _, columns, _ in rows}) > 1:
        raise ValueError("a comparison needs rows, all of the same columns")
    names = ["image", *rows[0][1]]
    share = width / len(names)
    heights = [picture.shape[0] / picture.shape[1] for picture, *_ in rows]
    figure = new_figure(width, sum(heights) * share + 0.25 * len(rows) + 0.5)
    panels = figure.subplots(len(rows), len(names), squeeze=False, height_ratios=heights)
    for own, (picture, columns, line) in zip(panels, rows):
        own[0].imshow(picture)
        own[0].set_xlabel(line, fontsize=8, loc="left")
        for axes, found in zip(own[1:], columns.values()):
            _paint(axes, picture, found)
        for axes in own:
            frame(axes, picture)
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, name in zip(panels[0], names):
        axes.set_title(name, fontsize=10)
    first = next(iter(rows[0][1].values()))
    if first["kind"] in ("boxes", "classes") and first.get("names"):
        handles = [
            panels[0, 0].plot([], [], "s", color=COLOURS[n % len(COLOURS)], label=name)[0]
            for n, name in enumerate(first["names"])
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def _paint(axes: Any, picture: np.ndarray, found: Mapping[str, Any]) -> None:
    """The picture and what is in it, without words."""
    if found["kind"] == "boxes":
        axes.imshow(picture)
        for (left, top, right, bottom), label in zip(
            np.asarray(found["boxes"]), np.asarray(found["labels"])
        ):
            x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
            axes.plot(x, y, color=COLOURS[int(label) % len(COLOURS)])
    elif found["kind"] == "instances":
        painted = grey(picture)
        for number, mask in enumerate(found["masks"]):
            mask = np.asarray(mask, bool)
            painted[mask] = 0.3 * painted[mask] + 0.7 * PALETTE[number % (len(PALETTE) - 1)]
        axes.imshow(painted)
    elif found["kind"] == "classes":
        classes = np.asarray(found["map"])
        axes.imshow(0.4 * grey(picture) + 0.6 * PALETTE[classes % len(COLOURS)])
    else:
        axes.imshow(picture)


def _name(found: Mapping[str, Any], label: int) -> str:
    names = found.get("names")
    return names[label] if names and label < len(names) else str(int(label))


def _legend(axes: Any, found: Mapping[str, Any], labels: np.ndarray) -> None:
    for label in labels:
        axes.plot(
            [], [], "s", color=COLOURS[int(label) % len(COLOURS)], label=_name(found, int(label))
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
