"""Published accuracy against measured throughput."""

from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, MARKERS, new_figure


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
            the display name. What comes before the last space or hyphen is the family.
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
    figure = new_figure(9.6, 4.2)
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
