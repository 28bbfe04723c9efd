"""The template of a project, outside the repository, with MMSOFT installed as a wheel."""

import json
import math
import os
import shutil
import subprocess

import pytest
from true_layout import make_ade20k, make_coco, make_shapes

SMALL = [
    "train_dataloader.dataset.pipeline.2.scale=(160,96)",
    "val_dataloader.dataset.pipeline.1.scale=(160,96)",
    "train_dataloader.dataset.filter_cfg.min_size=1",
]
OPTIONS = {
    "retinanet_softpp-t_coco": [],  # has its changes in the config, as a project would
    "retinanet_softpp-t_mydata": [*SMALL, "train_dataloader.batch_size=2"],
    "retinanet_stock": SMALL,
    "upernet_stock": [
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.2.scale=(256,96)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "model.data_preprocessor.size=(64,64)",
    ],
}


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("mmdet", "retinanet_softpp-t_coco"),
        ("mmsoft", "retinanet_softpp-t_mydata"),
        pytest.param("mmdet", "retinanet_stock", marks=pytest.mark.long),
        pytest.param("mmseg", "upernet_stock", marks=pytest.mark.long),
    ],
)
def test_project_trains_with_the_wheel_and_no_pythonpath(
    package, name, fresh_python, root, tmp_path
):
    library = "mmseg" if name.startswith("upernet") else "mmdet"
    pytest.importorskip(library)
    project = tmp_path / "project"
    shutil.copytree(root / "projects/template", project)
    if name.endswith("mydata"):  # as its README says
        make_shapes(project, 4, 2, 96)
        shutil.copytree(project / "shapes/coco", project / "data/mydata")
    elif library == "mmdet":
        make_coco(project)
    else:
        make_ade20k(project)
    length = "train_cfg.max_epochs=1" if library == "mmdet" else "train_cfg.max_iters=2"

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [fresh_python, "-m", "mim", "train", package, f"configs/{name}.py"]
    command += ["--gpus", "0", "--work-dir", "work", "--cfg-options", length]
    command += ["default_hooks.logger.interval=1", *OPTIONS[name]]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]

    text = max((project / "work").glob("*/vis_data/scalars.json")).read_text()
    losses = [entry["loss"] for entry in map(json.loads, text.splitlines()) if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    # Our COCO configs keep BatchNorm in evaluation mode, and this run has no weights.
    assert output.count("do not normalize") == (name == "retinanet_softpp-t_coco")
    # The config as it was resolved: our backbone, and no trace of the repository.
    resolved = (project / "work" / f"{name}.py").read_text()
    assert "type='mmsoft.SOFTPlusPlus'" in resolved
    for folder in ("mmsoft", "configs"):
        assert str(root / folder) not in output
