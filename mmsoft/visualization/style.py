"""One style for all figures: palette, figure, file.

Colours are viridis and cividis for quantities and the Okabe-Ito set for lines, which people with
any kind of colour vision can tell apart. matplotlib is imported when a figure is first drawn.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmsoft.fileio import write_whole

Extent = tuple[float, float, float, float]

# Okabe and Ito's colours, the dark ones first; with them a marker and a dash pattern each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
GREY = "#5F5F5F"  # an eighth, and what is not ours
DPI = 100
JPEG = dict(quality=60, optimize=True, progressive=True)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, apart from pyplot and its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib; install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.set_facecolor("white")
    return figure


def save_figure(
    figure: Any,
    path: str | os.PathLike,
    colours: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a figure, whole or not at all; the format is the suffix's, e.g. ``.png``, ``.svg``.

    A PNG has ``DPI`` pixels per inch of the figure, and with ``colours`` no more than so many
    colours: a drawing of lines takes half the bytes with 64. Such a PNG has ``metadata`` as text.

    Raises:
        ValueError: the suffix is not that of a known format.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path} must end in one of {', '.join(sorted(known))}")
    with write_whole(path) as partial:
        options = dict(pil_kwargs=JPEG) if kind in ("jpg", "jpeg") else {}
        figure.savefig(partial, format=kind, dpi=DPI, **options)
        if kind == "png" and colours is not None:
            from PIL import Image, PngImagePlugin

            notes = PngImagePlugin.PngInfo()
            for name, text in (metadata or {}).items():
                notes.add_text(name, text)
            picture = Image.open(partial).convert("RGB").quantize(colours)
            picture.save(partial, format="png", optimize=True, pnginfo=notes)
    return path


def grey(picture: np.ndarray) -> np.ndarray:
    """A pale grey version, as a background: luma of RGB, ``[H, W, 3]`` in 0..1."""
    luma = np.asarray(picture) @ np.array([0.299, 0.587, 0.114]) / 255
    return np.repeat(luma[..., None], 3, 2)


def frame(axes: Any, picture: np.ndarray) -> None:
    """Limit the axes to the picture."""
    height, width = picture.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.locator_params(nbins=4)
