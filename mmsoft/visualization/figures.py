"""The figures: matplotlib figures from arrays, to show in a notebook or to save.

Colours are viridis and cividis for quantities and the Okabe-Ito set for lines, which people with
any kind of colour vision can tell apart. matplotlib is imported when a figure is first drawn.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Extent = tuple[float, float, float, float]

# Okabe and Ito's colours, the dark ones first; with them a marker and a dash pattern each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
DPI = 100
BAND = (0.1, 0.9)  # quantiles


def _new_figure(width: float, height: float) -> Any:
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


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Write a figure, whole or not at all; the format is the suffix's, e.g. ``.png``, ``.svg``.

    A PNG has ``DPI`` pixels per inch of the figure.

    Raises:
        ValueError: the suffix is of no known format.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path} must end in one of {', '.join(sorted(known))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format=kind, dpi=DPI)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _grey(picture: np.ndarray) -> np.ndarray:
    """A pale grey version, on which colours show: luma of RGB, ``[H, W, 3]`` in 0..1."""
    luma = np.asarray(picture) @ np.array([0.299, 0.587, 0.114]) / 255
    return np.repeat(luma[..., None], 3, 2)


def _frame(axes: Any, picture: np.ndarray) -> None:
    """Limit the axes to the picture, whatever was painted over its edges."""
    height, width = picture.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.locator_params(nbins=4)


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
    figure = _new_figure(2.1 * columns + 0.8, (1.95 * aspect + 0.42) * len(queries) + 0.8)
    axes = figure.subplots(len(queries), columns, sharex=True, sharey=True, squeeze=False)
    background = 0.35 + 0.65 * _grey(picture)
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
            _frame(ax, picture)
    for ax in axes[-1]:
        ax.set_xlabel("x (pixels)")
    if painted is not None:
        bar = figure.colorbar(painted, ax=axes[:, -1], fraction=0.08, pad=0.03)
        bar.set_label("attention / largest of the map")
    figure.suptitle(title, fontsize=11)
    return figure


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
    figure = _new_figure(0.6 + 3.4 * len(residuals), 3.6)
    axes = figure.subplots(1, len(residuals), sharey=True, squeeze=False)[0]
    for ax, (stage, rules) in zip(axes, residuals.items()):
        for i, (rule, values) in enumerate(rules.items()):
            values = np.asarray(values, float)
            finite = np.where(np.isfinite(values), values, np.nan)
            steps = np.arange(len(values))
            low, high = np.nanquantile(finite, BAND, axis=1)
            ax.fill_between(steps, low, high, color=COLOURS[i], alpha=0.2, lw=0)
            mean = np.nanmean(finite, axis=1)
            ax.plot(
                steps,
                mean,
                DASHES[i],
                color=COLOURS[i],
                marker=MARKERS[i],
                ms=4,
                markevery=2,
                label=rule,
            )
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
    figure = _new_figure(11.2, 3.2 * aspect + 1.1)
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    axes[0].imshow(picture)
    axes[0].scatter(x, y, s=14, c="white", edgecolors="black", lw=0.8)
    axes[0].set_title(f"{len(centres)} landmarks (dots)", fontsize=10)

    # Every landmark in use has a colour; neighbours in number are far apart in colour, and borders
    # are drawn besides, because so many colours cannot all be told apart.
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
        _frame(ax, picture)
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
        that survives ``A A^+``: 1 where it is inverted, 0 where it is damped. Below: ``g`` itself
        beside ``1/x``.
    """
    figure = _new_figure(6.4, 5.2)
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


def draw_memory(operators: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """Peak memory against the length of the sequence, a line for each operator.

    Args:
        operators: with ``name``, ``tokens``, ``peak_mib`` and optionally ``label``, the name for
            people, and ``mode``: each mode has a panel. Those without a figure are left out.
        title: above everything.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in operators:
        if entry.get("peak_mib"):
            lines = panels.setdefault(entry.get("mode", ""), {})
            name = entry.get("label", entry["name"])
            lines.setdefault(name, []).append((entry["tokens"], entry["peak_mib"]))
    if not panels:
        raise ValueError("no entry under 'operator' has a peak_mib; nothing to draw")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = _new_figure(1.4 + 4.6 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (mode, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            i = names.index(name)
            style = dict(color=COLOURS[i % 7], marker=MARKERS[i % 7], ls=DASHES[i // 7 % 4])
            ax.plot(*zip(*sorted(points)), label=name, ms=5, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlabel("tokens")
        ax.set_title({"train": "forward and backward"}.get(mode, mode))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("peak memory (MiB)")
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _family(result: Mapping[str, Any]) -> tuple[str, str]:
    """A backbone's family and its size: SOFT++ and Tiny, Swin and T."""
    family, _, size = result.get("label", result["backbone"]).replace(" ", "-").rpartition("-")
    return family, size


def draw_tradeoff(
    results: Sequence[Mapping[str, Any]], accuracies: Mapping[str, float], title: str = ""
) -> Any:
    """Published accuracy against measured throughput, and against parameters.

    Args:
        results: with ``backbone``, ``images_per_second``, ``params_m`` and optionally ``label``,
            the name for people. What comes before the last space or hyphen is the family.
        accuracies: published top-1 accuracy in percent by backbone; other backbones are left out.
        title: above everything.

    Returns:
        A matplotlib figure of two panels.

    Raises:
        ValueError: no backbone has a published accuracy.
    """
    drawn = [r for r in results if r["backbone"] in accuracies]
    if not drawn:
        raise ValueError("no backbone under 'results' has a published accuracy; nothing to draw")
    families: dict[str, list[Mapping[str, Any]]] = {}
    for result in drawn:
        family, _ = _family(result)
        families.setdefault(family, []).append(result)
    figure = _new_figure(9.6, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    lines = [family for family, members in families.items() if len(members) > 1]
    panels = (("images_per_second", "throughput (images/s)"), ("params_m", "parameters (M)"))
    for ax, (key, label) in zip(axes, panels):
        for i, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda member: member[key])
            x = [member[key] for member in members]
            y = [accuracies[member["backbone"]] for member in members]
            ax.plot(x, y, color=COLOURS[i % 7], marker=MARKERS[i % 7], label=family)
            if len(members) == 1:
                continue  # the legend names it
            # Families take turns on either side of their line, because neighbours lie close.
            up = lines.index(family) % 2 == 0
            right = up == (key == "images_per_second")
            where = dict(xytext=(6 if right else -6, 5 if up else -12), textcoords="offset points")
            for member, a, b in zip(members, x, y):
                style = dict(fontsize=8, color=COLOURS[i % 7], ha="left" if right else "right")
                ax.annotate(_family(member)[1], (a, b), **where, **style)
        ax.set_xlabel(label)
        ax.margins(0.15)
        ax.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter("{x:g}")
    axes[0].tick_params(axis="x", which="minor", labelsize=7, rotation=45)
    axes[0].set_ylabel("ImageNet-1k top-1 (%),\nas published, not measured here")
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=11)
    return figure
