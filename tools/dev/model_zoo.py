#!/usr/bin/env python
"""Write the generated parts of the model zoo, or check that they are current.

    python tools/dev/model_zoo.py           # count every model (minutes) and write
    python tools/dev/model_zoo.py --check   # the same, but only name what is stale

These are: the counts in `configs/*/metafile.yml` (parameters and FLOPs of the built models) and
what they say of weights; from these files, whose other fields are edited by hand, the tables of
`docs/model_zoo.md`, `docs/weights.md` and `configs/*/README.md` (between `<!-- NAME -->` and
`<!-- /NAME -->`) and `model-index.yml`. Speed comes from the benchmarks kept in `docs/benchmarks/`.
"""

import argparse
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger
from tabulate import tabulate

from mmsoft import flops
from mmsoft.benchmark.report import merge, overview, read_json
from mmsoft.builder import build_model
from mmsoft.checkpoint.released import NO_WEIGHTS
from mmsoft.fileio import write_whole
from mmsoft.models.backbones.arch import resolve_arch
from mmsoft.ops import landmark_grid

ROOT = Path(__file__).resolve().parents[2]
# Folders of configs, and the (height, width) at which their library gives FLOPs.
SHAPES = dict(soft=(224, 224), retinanet=(800, 1280), mask_rcnn=(800, 1280), upernet=(512, 512))
HEAD = "# Counts and Weights are written by tools/dev/model_zoo.py, all else by hand.\n"
PUBLISHED = " (published by the authors)"  # ends the name of a metric
INVERSE = ("newton_raphson_pinv", "tikhonov_solve")  # an operator's part that the table lists apart


@dataclass(frozen=True)
class Counts:
    """Parameters; multiply-adds of one image, and those of them in the pseudo-inverse."""

    parameters: int
    flops: int
    inverse: int


def read_metafile(folder: str) -> dict[str, Any]:
    """The metafile of a folder of configs."""
    return yaml.safe_load((ROOT / "configs" / folder / "metafile.yml").read_text())


def models() -> list[tuple[str, dict[str, Any]]]:
    """Folder and entry of every model in the metafiles."""
    return [(folder, model) for folder in SHAPES for model in read_metafile(folder)["Models"]]


def published(model: dict[str, Any]) -> dict[str, float]:
    """Metrics of a model that the authors report, by short name."""
    metrics = [item for r in model.get("Results", []) for item in r["Metrics"].items()]
    return {
        name.removesuffix(PUBLISHED).replace("Top 1 Accuracy", "top-1"): value
        for name, value in metrics
        if name.endswith(PUBLISHED)
    }


# ----------------------------------------------------------------------------------------- counting


def count_parameters(config: Config) -> int:
    """Parameters of a config's model, heads for training alone included."""
    with torch.device("meta"):  # nothing is initialized
        return sum(parameter.numel() for parameter in build_model(config).parameters())


def count_flops(config: Config, shape: tuple[int, int]) -> tuple[int, int]:
    """Multiply-adds of one random image, and those of them in the pseudo-inverse."""
    torch.manual_seed(0)
    model = flops.tensor_model(config, shape)
    operators = flops.analyse(model, torch.rand(1, 3, *shape)).by_operator()
    return int(sum(operators.values())), int(sum(operators[name] for name in INVERSE))


COUNTED = ("Parameters", "FLOPs", "Pseudo-inverse FLOPs")  # in the order of Counts


def read_counts() -> dict[str, Counts]:
    """Read the counts in the metafiles."""
    return {
        model["Name"]: Counts(*(model["Metadata"][key] for key in COUNTED))
        for _, model in models()
        if set(COUNTED) <= set(model["Metadata"])
    }


def count_all(known: dict[str, Counts] | None = None) -> dict[str, Counts]:
    """Count every model, showing progress; FLOPs of ``known`` ones, which take minutes, are reused.

    Raises:
        ValueError: a config is not in its metafile, or the other way round.
    """
    known = known or {}
    counts: dict[str, Counts] = {}
    counted: dict[str, tuple[int, int]] = {}  # variants of a recipe share their model
    for folder in SHAPES:
        files = {path.stem for path in (ROOT / "configs" / folder).glob("*.py")}
        entries = {model["Name"] for model in read_metafile(folder)["Models"]}
        if difference := files ^ entries:
            raise ValueError(
                f"configs/{folder} and its metafile.yml differ in {', '.join(sorted(difference))}"
            )
    everything = models()
    for folder, model in everything:
        name, start = model["Name"], time.time()
        config = Config.fromfile(ROOT / model["Config"])
        if name in known:
            macs = known[name].flops, known[name].inverse
        else:
            key = f"{SHAPES[folder]} {config.model}"
            if key not in counted:
                counted[key] = count_flops(config, SHAPES[folder])
            macs = counted[key]
        counts[name] = Counts(count_parameters(config), *macs)
        if name not in known:
            seconds = time.time() - start
            print(f"[{len(counts):2d}/{len(everything)}] {name} ({seconds:.0f} s)", flush=True)
    return counts


def operator_macs(
    shape: tuple[int, int], max_landmarks: int | None, solver: str, arch: str
) -> tuple[int, Counter]:
    """Landmarks of stage 1, and multiply-adds of SOFT++'s operators, by kind, for one image."""
    settings = resolve_arch(arch)
    height, width = (-(-side // 4) for side in shape)
    landmarks: list[int] = []
    macs: Counter[str] = Counter()
    for stage, stride in enumerate(settings["landmark_strides"]):
        heads, blocks = settings["num_heads"][stage], settings["depths"][stage]
        d = settings["embed_dims"][stage] // heads
        m = prod(landmark_grid(height, width, stride, max_landmarks))
        tokens, points = [1, heads, height * width, d], [1, heads, m, d]
        kernel = flops.gaussian_kernel_product_macs(points, tokens, tokens)
        kernel += flops.gaussian_kernel_product_macs(tokens, points, points)
        macs["kernel products"] += blocks * kernel
        if solver == "newton":
            inverse = flops.newton_raphson_pinv_macs([1, heads, m, m], steps=20)
        else:
            inverse = flops.tikhonov_solve_macs([1, heads, m, m], points)
        macs["pseudo-inverse"] += blocks * inverse
        landmarks.append(m)
        height, width = -(-height // 2), -(-width // 2)
    return landmarks[0], macs


# ------------------------------------------------------------------------------------------ writing


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are flush right."""
    numeric = [all(re.fullmatch(r"[\d.]+|-", cell) for cell in column) for column in zip(*rows)]
    align = ["right" if right else "left" for right in numeric]
    return tabulate(rows, header, "pipe", colalign=align, disable_numparse=True) + "\n"


def folder_table(folder: str, counts: dict[str, Counts]) -> str:
    """The table of a folder's README."""
    entries = read_metafile(folder)["Models"]
    metrics = list(dict.fromkeys(metric for model in entries for metric in published(model)))
    header = ["model", "params (M)", "FLOPs (G)", "of these inverse (G)"]
    header += [*(f"{metric}, authors'" for metric in metrics), "config"]
    rows = []
    for model in entries:
        name, figures = model["Name"], published(model)
        count = counts[name]
        row = [model["Metadata"]["Label"], f"{count.parameters / 1e6:.2f}"]
        row += [giga(count.flops), giga(count.inverse)]
        row += [f"{figures[metric]:.1f}" if metric in figures else "-" for metric in metrics]
        rows.append([*row, f"[{name}]({name}.py)"])
    return table(header, rows)


def zoo_table(counts: dict[str, Counts]) -> str:
    """The table of all configs, in the documentation."""
    header = ["model", "params (M)", "FLOPs (G)", "at", "published by the authors", "configs/"]
    rows = []
    for folder, model in models():
        count = counts[model["Name"]]
        figures = [f"{value:.1f} {metric}" for metric, value in published(model).items()]
        row = [model["Metadata"]["Label"], f"{count.parameters / 1e6:.2f}", giga(count.flops)]
        row += ["{}x{}".format(*SHAPES[folder]), ", ".join(figures) or "-"]
        rows.append([*row, f"`{model['Config'].removeprefix('configs/')}`"])
    return table(header, rows)


def weights_table(counts: dict[str, Counts]) -> str:
    """The authors' files, and what they hold."""
    header = ["file", "loads into", "params (M)", "tensors", "float32 (MB)", "top-1, authors'"]
    rows = []
    for folder, model in models():
        name, metadata = model["Name"], model["Metadata"]
        if "Released File" in metadata:
            with torch.device("meta"):
                tensors = len(build_model(Config.fromfile(ROOT / model["Config"])).state_dict())
            parameters = counts[name].parameters
            link = f"[{metadata['Label']}]({metadata['Released File']['URL']})"
            row = [link, f"`{folder}/{name}.py`"]
            row += [f"{parameters / 1e6:.2f}", str(tensors), f"{parameters * 4 / 1e6:.0f}"]
            rows.append([*row, f"{published(model)['top-1']:.1f}"])
    return table(header, rows)


# Landmark budgets and solvers to compare; the last is that of the dense configs.
SETTINGS = ((None, "newton"), (256, "newton"), (256, "direct"), (49, "direct"))


def cost_table() -> str:
    """What the landmark budget and the solver change, at the sizes of ADE20K and COCO."""
    shapes = (512, 512), (800, 1344)
    header = ["backbone", "landmarks", "solver"]
    for height, width in shapes:
        header += [f"number at {height}x{width}", "kernel products (G)", "inverse (G)"]
    rows = []
    for arch in ("tiny", "large"):
        for budget, solver in SETTINGS:
            landmarks = f"at most {budget}" if budget else "fixed stride, as released"
            row = [arch.capitalize(), landmarks, f"`{solver}`"]
            for shape in shapes:
                number, macs = operator_macs(shape, budget, solver, arch)
                row += [str(number), *map(giga, macs.values())]
            rows.append(row)
    return table(header, rows)


def giga(macs: int) -> str:
    """Three digits or more, in units of 10^9."""
    return f"{macs / 1e9:.{0 if macs >= 100e9 else 1 if macs >= 10e9 else 2}f}"


def metafile(folder: str, counts: dict[str, Counts]) -> str:
    """`metafile.yml`, which mim, MMEngine and MMPreTrain read, with these counts."""
    content = read_metafile(folder)
    for model in content["Models"]:
        model["Metadata"].update(zip(COUNTED, asdict(counts[model["Name"]]).values()))
        model["Weights"] = NO_WEIGHTS
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=100)


def between(path: Path, name: str, content: str, text: str) -> str:
    """``text``, that of a file, with ``content`` between the markers ``name``, each there once."""
    pattern = re.compile(f"(<!-- {name} -->\n\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"{path} must have one line <!-- {name} -->, an empty one, and later <!-- /{name} -->"
        )
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def render(counts: dict[str, Counts]) -> dict[Path, str]:
    """Every generated file, whole: path -> text."""
    files = {}
    for folder in SHAPES:
        files[ROOT / "configs" / folder / "metafile.yml"] = metafile(folder, counts)
        readme = ROOT / "configs" / folder / "README.md"
        text = between(readme, "models", folder_table(folder, counts), readme.read_text())
        if folder != "soft":
            text = between(readme, "cost", cost_table(), text)
        files[readme] = text
    index = {"Import": [f"configs/{folder}/metafile.yml" for folder in SHAPES]}
    head = "# Written by tools/dev/model_zoo.py.\n"
    files[ROOT / "model-index.yml"] = head + yaml.safe_dump(index, sort_keys=False)
    page = ROOT / "docs" / "weights.md"
    files[page] = between(page, "released", weights_table(counts), page.read_text())
    page = ROOT / "docs" / "model_zoo.md"
    text = between(page, "model zoo", zoo_table(counts), page.read_text())
    files_measured = sorted((ROOT / "docs" / "benchmarks").glob("cpu*.json"))
    measured = merge([read_json(path) for path in files_measured])[0]
    files[page] = between(page, "measured", overview(measured), text)
    return files


def stale(files: dict[Path, str]) -> list[str]:
    """Those that differ from what is on the disk, relative to the root."""
    return [
        str(path.relative_to(ROOT))
        for path, text in files.items()
        if not path.exists() or path.read_text() != text
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and name stale files"
    )
    parser.add_argument(
        "--keep-flops",
        action="store_true",
        help="take FLOPs from the metafiles where they have them: seconds instead of minutes",
    )
    args = parser.parse_args()
    MMLogger.get_instance("model_zoo").setLevel("ERROR")  # what the libraries log when building
    try:
        render({model["Name"]: Counts(0, 0, 0) for _, model in models()})
        files = render(count_all(read_counts() if args.keep_flops else None))
    except (ValueError, OSError) as error:  # a marker or a README is missing
        sys.exit(f"error: {error}")
    changed = stale(files)
    if not changed:
        print("all current")
    elif args.check:
        sys.exit(f"stale: {', '.join(changed)}; run python tools/dev/model_zoo.py")
    for name in changed:
        with write_whole(ROOT / name) as partial:
            partial.write_text(files[ROOT / name])
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
