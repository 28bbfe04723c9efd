#!/usr/bin/env python
"""Draw the benchmark tool's JSON: memory against tokens, accuracy against throughput.

    python tools/analysis_tools/plot_benchmark.py BENCHMARK.json --out-dir work_dirs/figures

Writes `memory.png` (SOFT, figure 1) from the entries under `operator`, and `tradeoff.png` (figure
3) from the forward passes under `results`, with the accuracies that the authors published: they
are read from the model index (configs/soft/metafile.yml) and were not measured here.
"""

import argparse
import json
import sys
from pathlib import Path

import mmengine

from mmsoft.visualization import draw_memory, draw_tradeoff, save_figure

METAFILE = Path(__file__).resolve().parents[2] / "configs/soft/metafile.yml"
PUBLISHED = "Top 1 Accuracy (published by the authors)"


def published_accuracies() -> dict[str, float]:
    """Top-1 accuracy in percent by backbone: `soft-tiny`, `softpp-tiny` and so on."""
    accuracies = {}
    for model in mmengine.load(METAFILE)["Models"]:
        for result in model.get("Results", []):
            if PUBLISHED in result["Metrics"]:
                accuracies[model["Name"].partition("_")[0]] = result["Metrics"][PUBLISHED]
    return accuracies


def read(path: str) -> dict:
    """The JSON, checked as far as the figures need it.

    Raises:
        ValueError: it is not the benchmark tool's.
    """
    try:
        data = json.loads(Path(path).read_text())
        for key, names in (
            ("results", ("backbone", "mode", "images_per_second", "params_m", "size", "batch")),
            ("operator", ("name", "tokens", "peak_mib")),
        ):
            for entry in data.get(key, []):
                if missing := [name for name in names if name not in entry]:
                    raise ValueError(f"an entry under '{key}' lacks {missing}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the benchmark tool's JSON: {error}") from error
    return data


def forward_passes(results: list[dict]) -> list[dict]:
    """The forward passes of one size, batch and dtype: those of most backbones."""
    groups: dict[tuple, list[dict]] = {}
    for entry in results:
        if entry["mode"] == "forward" and entry["images_per_second"]:
            key = (tuple(entry["size"]), entry["batch"], entry.get("dtype"), entry.get("device"))
            groups.setdefault(key, []).append(entry)
    return max(groups.values(), key=len, default=[])


def draw(path: str, out_dir: Path) -> list[Path]:
    """Write the figures for which the JSON has entries."""
    data = read(path)
    device, date = data.get("device", "unknown device"), data.get("date", "undated")
    written = []
    if data.get("operator"):
        figure = draw_memory(data["operator"], title=f"Memory of one attention layer, {device}")
        written.append(save_figure(figure, out_dir / "memory.png"))
    passes = forward_passes(data.get("results", []))
    if passes:
        accuracies = published_accuracies()
        unknown = sorted({p["backbone"] for p in passes} - set(accuracies))
        if unknown:
            names = ", ".join(unknown)
            print(f"not drawn, no published accuracy in {METAFILE.name}: {names}", file=sys.stderr)
        height, width = passes[0]["size"]
        title = f"{device}, {height}x{width}, batch {passes[0]['batch']}, {date}"
        figure = draw_tradeoff(passes, accuracies, title=title)
        written.append(save_figure(figure, out_dir / "tradeoff.png"))
    if not written:
        raise ValueError(f"{path} has neither operator measurements nor forward passes")
    return written


def main() -> int:
    """Run the command line; one line for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", help="written by the benchmark tool")
    parser.add_argument("--out-dir", type=Path, default=Path(), help="default: this folder")
    args = parser.parse_args()
    try:
        print(*draw(args.json, args.out_dir), sep="\n")
    except (ImportError, OSError, ValueError) as error:
        print(f"plot_benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
