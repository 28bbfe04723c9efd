#!/usr/bin/env python
"""Write everything of the model zoo that is generated, or check that it is current.

    python tools/dev/model_zoo.py           # count every model (minutes) and write
    python tools/dev/model_zoo.py --check   # the same, but only name what is stale

That is: the tables of `README.md` and of `configs/*/README.md` (between `<!-- NAME -->` and
`<!-- /NAME -->`), `configs/*/metafile.yml` and `model-index.yml`, and the table of
`docs/model_zoo.md`, from the benchmarks kept beside it. Parameters and FLOPs are counted on the
built models. What is typed stands below: what each config is, and what the papers report.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmsoft import flops
from mmsoft.models.backbones.arch import resolve_arch
from mmsoft.ops import landmark_grid

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "analysis_tools"))
from benchmark_report import merge, overview, read_json  # noqa: E402
from get_flops import analyse  # noqa: E402

SOFT_PAPER = dict(
    Title="SOFT: Softmax-free Transformer with Linear Complexity",
    URL="https://arxiv.org/abs/2110.11945",
)
SOFTPP_PAPER = dict(
    Title="Softmax-free Linear Transformers", URL="https://arxiv.org/abs/2207.03341"
)


@dataclass(frozen=True)
class Metric:
    """A published figure: its task and name in metafiles, its name in a table's cell."""

    task: str
    name: str
    short: str


@dataclass(frozen=True)
class Folder:
    """A folder of configs.

    Attributes:
        shape: (height, width) at which its library gives FLOPs.
        models: config name -> (what it is, its published figures or none).
        collections: the metafile's; a model belongs to the one whose name is the first word of
            what it is, or to the only one.
    """

    name: str
    shape: tuple[int, int]
    dataset: str
    metrics: tuple[Metric, ...]
    models: dict[str, tuple]
    collections: dict[str, dict]

    @property
    def path(self) -> Path:
        return ROOT / "configs" / self.name

    def config(self, model: str) -> Path:
        return self.path / f"{model}.py"


BOX_AP = Metric("Object Detection", "box AP", "box AP")
MASK_AP = Metric("Instance Segmentation", "mask AP", "mask AP")

# Published figures: SOFT from arXiv 2110.11945, SOFT++ from arXiv 2207.03341.
FOLDERS = (
    Folder(
        "soft",
        (224, 224),
        "ImageNet-1k",
        (Metric("Image Classification", "Top 1 Accuracy", "top-1"),),
        {
            "soft-tiny_8xb128_in1k": ("SOFT Tiny", 79.3),
            "soft-small_8xb128_in1k": ("SOFT Small", 82.2),
            "soft-medium_8xb32_in1k": ("SOFT Medium", 82.9),
            "soft-large_8xb32_in1k": ("SOFT Large", 83.1),
            "soft-huge_8xb32_in1k": ("SOFT Huge", 83.3),
            "softpp-tiny_8xb128_in1k": ("SOFT++ Tiny", 79.4),
            "softpp-small_8xb128_in1k": ("SOFT++ Small", 82.4),
            "softpp-medium_8xb32_in1k": ("SOFT++ Medium", 83.1),
            "softpp-large_8xb32_in1k": ("SOFT++ Large", 83.3),
            "softpp-huge_8xb32_in1k": ("SOFT++ Huge", 83.4),
        },
        {
            "SOFT": dict(Architecture=["Softmax-free Attention"], Paper=SOFT_PAPER),
            "SOFT++": dict(
                Architecture=["Softmax-free Attention", "Symmetric Normalization"],
                Paper=SOFTPP_PAPER,
            ),
        },
    ),
    Folder(
        "retinanet",
        (800, 1280),
        "COCO",
        (BOX_AP,),
        {
            "retinanet_softpp-t_fpn_1x_coco": ("RetinaNet, SOFT++ Tiny", 40.0),
            "retinanet_softpp-s_fpn_1x_coco": ("RetinaNet, SOFT++ Small", 42.8),
            "retinanet_softpp-m_fpn_1x_coco": ("RetinaNet, SOFT++ Medium", 44.3),
            "retinanet_softpp-l_fpn_1x_coco": ("RetinaNet, SOFT++ Large", 45.3),
        },
        {
            "RetinaNet with SOFT++": dict(
                Architecture=["Softmax-free Attention", "FPN", "Focal Loss"], Paper=SOFTPP_PAPER
            )
        },
    ),
    Folder(
        "mask_rcnn",
        (800, 1280),
        "COCO",
        (BOX_AP, MASK_AP),
        {
            "mask-rcnn_softpp-t_fpn_1x_coco": ("Mask R-CNN, SOFT++ Tiny", 41.2, 38.2),
            "mask-rcnn_softpp-s_fpn_1x_coco": ("Mask R-CNN, SOFT++ Small", 43.8, 40.1),
            "mask-rcnn_softpp-m_fpn_1x_coco": ("Mask R-CNN, SOFT++ Medium", 46.6, 42.0),
            "mask-rcnn_softpp-l_fpn_1x_coco": ("Mask R-CNN, SOFT++ Large", 47.0, 42.2),
            "mask-rcnn_softpp-s_fpn_ms-3x_coco": ("Mask R-CNN, SOFT++ Small, multi-scale 3x",),
            "mask-rcnn_softpp-t_fpn_amp-1x_coco": ("Mask R-CNN, SOFT++ Tiny, mixed precision",),
            "mask-rcnn_softpp-t_fpn_layer-decay-1x_coco": ("Mask R-CNN, SOFT++ Tiny, layer decay",),
        },
        {
            "Mask R-CNN with SOFT++": dict(
                Architecture=["Softmax-free Attention", "FPN", "RPN", "RoIAlign"],
                Paper=SOFTPP_PAPER,
            )
        },
    ),
    Folder(
        "upernet",
        (512, 512),
        "ADE20K",
        (Metric("Semantic Segmentation", "mIoU", "mIoU"),),
        {
            "upernet_softpp-t_8xb2-160k_ade20k-512x512": ("UperNet, SOFT++ Tiny",),
            "upernet_softpp-s_8xb2-160k_ade20k-512x512": ("UperNet, SOFT++ Small", 46.2),
            "upernet_softpp-m_8xb2-160k_ade20k-512x512": ("UperNet, SOFT++ Medium", 48.0),
            "upernet_softpp-l_8xb2-160k_ade20k-512x512": ("UperNet, SOFT++ Large",),
        },
        {
            "UPerNet with SOFT++": dict(
                Architecture=["Softmax-free Attention", "UPerNet"], Paper=SOFTPP_PAPER
            )
        },
    ),
)

HEAD = "# Written by tools/dev/model_zoo.py.\n"
INVERSE = ("newton_raphson_pinv", "tikhonov_solve")  # an operator's part that the table lists apart


@dataclass(frozen=True)
class Counts:
    """Parameters; multiply-adds of one image, and those of them in the pseudo-inverse."""

    parameters: int
    flops: int
    inverse: int


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


def count_parameters(config: Config) -> int:
    """Parameters of a config's model, heads for training alone included."""
    init_default_scope(config.default_scope)
    with torch.device("meta"):  # nothing is initialised
        return sum(parameter.numel() for parameter in MODELS.build(config.model).parameters())


def count_flops(config: Config, shape: tuple[int, int]) -> tuple[int, int]:
    """Multiply-adds of one random image, and those of them in the pseudo-inverse."""
    torch.manual_seed(0)
    operators = analyse(config, shape)[1].by_operator()
    return int(sum(operators.values())), int(sum(operators[name] for name in INVERSE))


def read_counts() -> dict[str, Counts]:
    """What the metafiles say."""
    counts = {}
    for folder in FOLDERS:
        file = folder.path / "metafile.yml"
        for model in yaml.safe_load(file.read_text())["Models"] if file.exists() else ():
            data = model.get("Metadata", {})
            if {"Parameters", "FLOPs", "Pseudo-inverse FLOPs"} <= set(data):
                counts[model["Name"]] = Counts(
                    data["Parameters"], data["FLOPs"], data["Pseudo-inverse FLOPs"]
                )
    return counts


def count_all(known: dict[str, Counts] | None = None) -> dict[str, Counts]:
    """Count every model, showing progress.

    Args:
        known: where the FLOPs of a model stand here, they are taken (they cost minutes, parameters
            seconds).

    Raises:
        ValueError: a config is not in the table above, or the other way round.
    """
    known = known or {}
    counts: dict[str, Counts] = {}
    counted: dict[str, tuple[int, int]] = {}  # variants of a recipe share their model
    total = sum(len(folder.models) for folder in FOLDERS)
    for folder in FOLDERS:
        files = {path.stem for path in folder.path.glob("*.py")}
        if difference := files ^ set(folder.models):
            raise ValueError(
                f"configs/{folder.name} and the table in tools/dev/model_zoo.py differ in "
                f"{', '.join(sorted(difference))}"
            )
    for folder in FOLDERS:
        for name in folder.models:
            start = time.time()
            config = Config.fromfile(folder.config(name))
            if name in known:
                macs = known[name].flops, known[name].inverse
            else:
                model = f"{folder.shape} {config.model}"
                if model not in counted:
                    counted[model] = count_flops(config, folder.shape)
                macs = counted[model]
            counts[name] = Counts(count_parameters(config), *macs)
            if name not in known:
                seconds = time.time() - start
                print(f"[{len(counts):2d}/{total}] {name} ({seconds:.0f} s)", flush=True)
    return counts


def operator_macs(
    shape: tuple[int, int], max_landmarks: int | None, solver: str, arch: str
) -> tuple[int, Counter]:
    """Multiply-adds of the operator in the softmax-free stages of SOFT++, for one image.

    Returns:
        landmarks (of stage 1), and a Counter of the kernel products and the pseudo-inverse.
    """
    settings = resolve_arch(arch)
    height, width = (-(-side // 4) for side in shape)
    landmarks, macs = [], Counter()
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


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are flush right."""
    numeric = [all(re.fullmatch(r"[\d.]+|-", cell) for cell in column) for column in zip(*rows)]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def folder_table(folder: Folder, counts: dict[str, Counts]) -> str:
    """The table of a folder's README."""
    metrics = [f"{metric.short}, authors'" for metric in folder.metrics]
    header = ["model", "params (M)", "FLOPs (G)", "of these inverse (G)", *metrics, "config"]
    rows = []
    for name, (label, *published) in folder.models.items():
        count = counts[name]
        figures = [f"{value:.1f}" for value in published] or ["-"] * len(metrics)
        numbers = f"{count.parameters / 1e6:.2f}", *map(giga, (count.flops, count.inverse))
        rows.append([label, *numbers, *figures, f"[{name}]({name}.py)"])
    return table(header, rows)


def zoo_table(counts: dict[str, Counts]) -> str:
    """The table of the top README."""
    header = ["model", "params (M)", "FLOPs (G)", "at", "published by the authors", "config"]
    rows = []
    for folder in FOLDERS:
        for name, (label, *published) in folder.models.items():
            figures = [
                f"{value:.1f} {metric.short}" for metric, value in zip(folder.metrics, published)
            ]
            rows.append(
                [
                    label,
                    f"{counts[name].parameters / 1e6:.2f}",
                    giga(counts[name].flops),
                    "{}x{}".format(*folder.shape),
                    ", ".join(figures) or "-",
                    f"[config](configs/{folder.name}/{name}.py)",
                ]
            )
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


def metafile(folder: Folder, counts: dict[str, Counts]) -> str:
    """`metafile.yml`, which mim, MMEngine and MMPreTrain read."""
    collections = [
        {
            "Name": name,
            "Metadata": {"Training Data": folder.dataset, "Architecture": data["Architecture"]},
            "Paper": dict(data["Paper"]),
            "README": f"configs/{folder.name}/README.md",
        }
        for name, data in folder.collections.items()
    ]
    models = []
    for name, (label, *published) in folder.models.items():
        own = label.split()[0] if len(collections) > 1 else collections[0]["Name"]
        model = {
            "Name": name,
            "In Collection": own,
            "Config": f"configs/{folder.name}/{name}.py",
            "Metadata": {
                "FLOPs": counts[name].flops,
                "Pseudo-inverse FLOPs": counts[name].inverse,
                "Parameters": counts[name].parameters,
            },
        }
        if published:
            model["Results"] = [
                {
                    "Task": metric.task,
                    "Dataset": folder.dataset,
                    "Metrics": {f"{metric.name} (published by the authors)": value},
                }
                for metric, value in zip(folder.metrics, published)
            ]
        models.append(model)
    content = dict(Collections=collections, Models=models)
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=100)


def between(path: Path, name: str, content: str, text: str) -> str:
    """``text`` with ``content`` between the markers ``name``.

    Raises:
        ValueError: ``text``, that of the file ``path``, does not have the markers once each.
    """
    pattern = re.compile(f"(<!-- {name} -->\n\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"{path} must have one line <!-- {name} -->, an empty one, and later <!-- /{name} -->"
        )
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def render(counts: dict[str, Counts]) -> dict[Path, str]:
    """Every generated file, whole: path -> text."""
    files = {}
    for folder in FOLDERS:
        files[folder.path / "metafile.yml"] = metafile(folder, counts)
        readme = folder.path / "README.md"
        text = between(readme, "models", folder_table(folder, counts), readme.read_text())
        if folder.name != "soft":
            text = between(readme, "cost", cost_table(), text)
        files[readme] = text
    index = {"Import": [f"configs/{folder.name}/metafile.yml" for folder in FOLDERS]}
    files[ROOT / "model-index.yml"] = HEAD + yaml.safe_dump(index, sort_keys=False)
    readme = ROOT / "README.md"
    files[readme] = between(readme, "model zoo", zoo_table(counts), readme.read_text())
    page = ROOT / "docs" / "model_zoo.md"
    files_measured = sorted((ROOT / "docs" / "benchmarks").glob("cpu*.json"))
    measured = merge([read_json(path) for path in files_measured])[0]
    files[page] = between(page, "measured", overview(measured), page.read_text())
    return files


def stale(files: dict[Path, str]) -> list[str]:
    """Those that differ from what is on the disk, relative to the root."""
    return [
        str(path.relative_to(ROOT))
        for path, text in files.items()
        if not path.exists() or path.read_text() != text
    ]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)


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
    try:
        render({name: Counts(0, 0, 0) for folder in FOLDERS for name in folder.models})
        files = render(count_all(read_counts() if args.keep_flops else None))
    except (ValueError, OSError) as error:  # a marker or a README is missing
        sys.exit(f"error: {error}")
    changed = stale(files)
    if args.check:
        if changed:
            names = ", ".join(changed)
            sys.exit(f"stale: {names}; run python tools/dev/model_zoo.py")
        print("all current")
        return
    for path, text in files.items():
        if str(path.relative_to(ROOT)) in changed:
            write(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
    if not changed:
        print("all current")


if __name__ == "__main__":
    main()
