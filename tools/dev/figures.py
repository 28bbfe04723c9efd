"""Make the pictures of docs/look_inside.md, but for the benchmark's, and budgets.png anew.

    python tools/dev/figures.py                # `make figures`: about 20 minutes on two cores

Trains, where work_dirs/figures lacks them, two segmentors on the data set that needs attention, one
with landmarks by content and one with released landmarks, and draws into docs/figures/. The figure
of budgets is drawn from docs/landmark_budgets.json, which tools/analysis_tools/landmark_budgets.py
measured.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsoft.commands import CommandError, train_and_test
from mmsoft.visualization import draw_budgets, save_figure

ROOT = Path(__file__).resolve().parents[2]
FIGURES, ROWS = ROOT / "docs/figures", ROOT / "docs/landmark_budgets.json"
WORK = ROOT / "work_dirs/figures"
CONFIG = "configs/demo/upernet_softpp-mini{}_legend.py"
MODELS = {"content": CONFIG.format(""), "released": CONFIG.format("-released")}
LARGE = "data/legend256"
IMAGE = f"{LARGE}/ade/images/validation/ADE_val_00000003.jpg"
QUERIES = ("44,35", "200,112", "120,220")  # a plain shape of each colour


def run(script: str, *arguments: object) -> None:
    """Run a tool in the root of the repository."""
    subprocess.run([sys.executable, f"tools/{script}", *map(str, arguments)], cwd=ROOT, check=True)


def trained(name: str) -> str:
    """The checkpoint of a model, which is trained if there is none."""
    folder = WORK / name
    if not (folder / "last_checkpoint").is_file():
        train_and_test(name, ["mmseg", MODELS[name], "--gpus", "0"], folder, ROOT)
    return (folder / "last_checkpoint").read_text()


def main() -> None:
    """Make the data, train, draw."""
    shapes = "dataset_converters/make_shapes.py"
    run(shapes, "data/legend", "--legend", "--size", 128, "--train", 2000, "--val", 200)
    run(shapes, LARGE, "--legend", "--size", 256, "--train", 1, "--val", 40)
    content, released = trained("content"), trained("released")
    queries = [word for query in QUERIES for word in ("--query", query)]
    ours = (MODELS["content"], IMAGE, content, "--stage", 2, "--block", 0)
    tools, out = "analysis_tools", FIGURES / "attention.jpg"
    run(f"{tools}/visualize_attention.py", *ours, *queries, "--compare", "softmax", "--out", out)
    out = FIGURES / "landmarks.jpg"
    run(f"{tools}/visualize_landmarks.py", *ours, "--head", 1, "--out", out)
    theirs = (MODELS["released"], IMAGE, released, "--stage", 2, "--block", 0)
    regions, out = WORK / "regions.png", FIGURES / "spectrum.png"
    run(f"{tools}/visualize_landmarks.py", *theirs, "--out", regions, "--spectrum-out", out)
    out = WORK / "convergence.png"  # with a CSV beside it
    run(f"{tools}/newton_convergence.py", MODELS["released"], released, "--out", out)
    shutil.copy(out, FIGURES)
    rows: Sequence[Mapping[str, Any]] = json.loads(ROWS.read_text())
    save_figure(draw_budgets(rows), FIGURES / "budgets.png", colours=24)


if __name__ == "__main__":
    try:
        main()
    except (CommandError, subprocess.CalledProcessError) as error:
        sys.exit(f"figures: {error}")
