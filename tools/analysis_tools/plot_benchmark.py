#!/usr/bin/env python
"""Draw the benchmark tool's JSON: memory against tokens, accuracy against throughput.

    python tools/analysis_tools/plot_benchmark.py BENCHMARK.json --out-dir work_dirs/figures

Writes `memory.png` (SOFT, figure 1) from the entries under `operator`, and `tradeoff.png` (figure
3) from the forward passes under `results`, with the accuracies that the papers state: none were
measured here.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmark_models import BACKBONES

from mmsoft.visualization import draw_memory, draw_tradeoff, save_figure

# ImageNet-1k top-1 at 224x224 without other data, in percent, as each paper states it.
PUBLISHED = {
    # arXiv 2207.03341
    "soft-tiny": 79.3,
    "soft-small": 82.2,
    "soft-medium": 82.9,
    "soft-large": 83.1,
    "soft-huge": 83.3,
    "softpp-tiny": 79.4,
    "softpp-small": 82.4,
    "softpp-medium": 83.1,
    "softpp-large": 83.3,
    "softpp-huge": 83.4,
    "pvt-tiny": 75.1,  # arXiv 2102.12122
    "pvtv2-b1": 78.7,  # arXiv 2106.13797
    "pvtv2-b2": 82.0,
    "swin-tiny": 81.3,  # arXiv 2103.14030
    "convnext-tiny": 82.1,  # arXiv 2201.03545
}


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
            key = (tuple(entry["size"]), entry["batch"], entry.get("dtype"), entry.get("compiled"))
            groups.setdefault(key, []).append(entry)
    return max(groups.values(), key=len, default=[])


def labelled(entry: dict) -> dict:
    """A backbone's entry with its name for people, where the benchmark tool has one."""
    known = BACKBONES.get(entry["backbone"])
    return {**entry, "label": known.label} if known else entry


def draw(data: dict, out_dir: Path, prefix: str = "") -> dict[str, Path]:
    """Write the figures for which the data have entries.

    Args:
        data: of the benchmark tool.
        out_dir: where the files go.
        prefix: before the names of the files.

    Returns:
        The files: "operator" -> memory against tokens, "results" -> accuracy against throughput.
    """
    device, date = data.get("device", "unknown device"), data.get("date", "undated")
    written = {}
    operators = [entry for entry in data.get("operator", []) if entry["peak_mib"]]
    if operators:
        operators = [e for e in operators if e.get("dtype") == operators[0].get("dtype")]
        figure = draw_memory(operators, title=f"Memory of one attention layer, {device}")
        written["operator"] = save_figure(figure, out_dir / f"{prefix}memory.png")
    passes = forward_passes(data.get("results", []))
    if any(entry["backbone"] in PUBLISHED for entry in passes):
        height, width = passes[0]["size"]
        title = f"{device}, {height}x{width}, batch {passes[0]['batch']}, {date[:10]}"
        figure = draw_tradeoff([*map(labelled, passes)], PUBLISHED, title=title)
        written["results"] = save_figure(figure, out_dir / f"{prefix}tradeoff.png")
    return written


def main() -> int:
    """Run the command line; one line for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", help="written by the benchmark tool")
    parser.add_argument("--out-dir", type=Path, default=Path(), help="default: this folder")
    args = parser.parse_args()
    try:
        data = read(args.json)
        written = draw(data, args.out_dir)
        if not written:
            raise ValueError(
                f"{args.json} has neither operators with a peak_mib nor forward passes of "
                "backbones with a published accuracy"
            )
        unknown = {entry["backbone"] for entry in forward_passes(data.get("results", []))}
        if unknown := unknown - set(PUBLISHED):
            names = ", ".join(sorted(unknown))
            print(f"not drawn, no published accuracy known: {names}", file=sys.stderr)
        print(*written.values(), sep="\n")
    except (ImportError, OSError, ValueError) as error:
        print(f"plot_benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
