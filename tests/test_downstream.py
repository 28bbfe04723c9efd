"""What a user does outside the repository: the README's commands, the template of a project."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loading import load_tool
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


def run(command, folder):
    """Without this environment's variables for Python; gives what the command printed."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def train_two_steps(command, folder, *options):
    """With finite losses; gives what the command printed."""
    options = ["default_hooks.logger.interval=1", *options]
    output = run([*command, "--work-dir", "work", "--cfg-options", *options], folder)
    text = max((folder / "work").glob("*/vis_data/scalars.json")).read_text()
    losses = [entry["loss"] for entry in map(json.loads, text.splitlines()) if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    return output


@pytest.mark.long
def test_the_readmes_commands_install_and_train(wheel, root, tmp_path):
    """From the package index: torch, torchvision, what `.[all]` names, and nothing from here.

    mmcv, which the README wants in place too, is the one that the set-up compiled for this torch.
    """
    setup_env = load_tool("dev/setup_env.py")
    words = " ".join(path.read_text() for path in (root / "requirements").glob("*.txt")).split()
    torch = [word for word in words if word.startswith(("torch==", "torchvision=="))]
    setup_env.PYTHON = Path(sys.executable)
    compiled = [p for p in setup_env.wheel_folder().glob("mmcv-*.whl") if setup_env.is_sound(p)]
    if not compiled:
        pytest.skip("no mmcv compiled by `make setup` for this Python and torch")
    readme = (root / "README.md").read_text()
    install, train = (
        shlex.split(re.search(f"^{words} .*", readme, re.MULTILINE).group(), comments=True)
        for words in ("pip install", "mim train mmdet")
    )
    assert install[2:] == [".[all]"]
    config = re.search(r"```python\n(_base_ = .*?)```", readme, re.DOTALL).group(1)

    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    programs = tmp_path / "venv" / "bin"
    pip = [programs / "pip", "install", "--quiet"]
    run([*pip, *torch], tmp_path)
    # As the set-up does: the index may have torchvision for CUDA only.
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copy(root / "tools/dev/torchvision_schemas.py", site_packages)
    (site_packages / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
    run([*pip, compiled[0]], tmp_path)
    (source,) = filter(Path.is_dir, wheel.parent.glob("mmsoft-*"))  # the source distribution
    run([programs / install[0], *install[1:], "--quiet"], source)
    run([programs / "pip", "check"], tmp_path)

    (tmp_path / "detector.py").write_text(config)
    make_coco(tmp_path)
    train[0], train[train.index("CONFIG")] = programs / "mim", "detector.py"
    train[train.index("--gpus") + 1] = "0"
    output = train_two_steps(train, tmp_path, "train_cfg.max_epochs=1", *SMALL)
    assert str(root / "mmsoft") not in output
    assert "type='mmsoft.SOFTPlusPlus'" in (tmp_path / "work/detector.py").read_text()


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
    command = [fresh_python, "-m", "mim", "train", package, f"configs/{name}.py", "--gpus", "0"]
    output = train_two_steps(command, project, length, *OPTIONS[name])

    # Our COCO configs keep BatchNorm in evaluation mode, and this run has no weights.
    assert output.count("do not normalize") == (name == "retinanet_softpp-t_coco")
    # The config as it was resolved: our backbone, and no trace of the repository.
    resolved = (project / "work" / f"{name}.py").read_text()
    assert "type='mmsoft.SOFTPlusPlus'" in resolved
    for folder in ("mmsoft", "configs"):
        assert str(root / folder) not in output
