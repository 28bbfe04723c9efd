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
from mmengine.config import Config
from true_layout import make_ade20k, make_coco

SMALL = [
    "train_dataloader.dataset.pipeline.2.scale=(160,96)",
    "val_dataloader.dataset.pipeline.1.scale=(160,96)",
    "train_dataloader.dataset.filter_cfg.min_size=1",
]
OPTIONS = {
    "retinanet_softpp-t_coco": [],  # has its changes in the config, as a project would
    "retinanet_stock": SMALL,
    "upernet_stock": [
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.2.scale=(256,96)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "model.data_preprocessor.size=(64,64)",
    ],
}


def run(command, folder, **settings):
    """Without this environment's variables for Python; gives what the command printed."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment.update(settings)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def commands(text):
    """The commands of a page's fenced blocks: those to run, and those that a comment exempts."""
    pattern = r"(<!-- not run: (?:(?!-->).)+ -->\n)?^```(\w*)\n(.*?)^```$"
    blocks = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    assert 2 * len(blocks) == text.count("```") + text.count("~~~"), "a block has another form"
    tested, exempt = [], []
    for reason, language, block in blocks:
        if language != "text":
            (exempt if reason else tested).extend(block.replace("\\\n", " ").splitlines())
    return tested, exempt


def follow(page, root, tmp_path, source, **settings):
    """Give a page's commands to one shell, in a checkout; gives what they printed."""
    shutil.copytree(source, tmp_path / "checkout")
    tested, _ = commands(page)
    script = "\n".join(["set -euo pipefail", *tested])
    output = run(["bash", "-c", script], tmp_path / "checkout", **settings)

    project = tmp_path / "my_project"
    trained = project / "work_dirs/retinanet_softpp-t_trial"
    resolved = (trained / "retinanet_softpp-t_trial.py").read_text()
    assert "type='mmsoft.SOFTPlusPlus'" in resolved
    for folder in ("mmsoft", "configs"):
        assert str(root / folder) not in output + resolved
    (loss,) = re.findall(r"Epoch\(train\).* loss: (\S+)", output)
    assert math.isfinite(float(loss))
    assert (trained / "epoch_1.pth").is_file()
    pictures = len(list((project / "data/mydata/val2017").iterdir()))
    assert len(list(trained.glob("*/predictions/*.jpg"))) == pictures > 0
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


@pytest.fixture
def template(root):
    """The page that a newcomer follows."""
    return (root / "projects/template/README.md").read_text()


@pytest.mark.long
def test_the_readmes_commands_install_and_train(wheel, root, tmp_path, template):
    """From the package index: torch, torchvision and what `.[all]` names.

    What the README wants in place is from here: mmcv, compiled by the set-up for this torch, and
    the schemas that a torchvision for CUDA lacks on a machine without one.
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
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    follow(template, root, tmp_path, source, PATH=path)


def test_commands_of_a_page():
    text = """
```
one --long \\
    --option
two && three
```
<!-- not run: it is
large -->
```bash
four
```
```text
a/folder
```
"""
    assert commands(text) == (["one --long      --option", "two && three"], ["four"])
    for other in ("~~~\nfive\n~~~\n", "  ```\n  five\n  ```\n", "``` {.sh}\nfive\n```\n"):
        with pytest.raises(AssertionError, match="another form"):
            commands(text + other)
    unexplained = text.replace("it is\nlarge", "")
    assert commands(unexplained)[1] == []


def test_the_templates_readme_runs_as_it_stands(template, fresh_python, wheel, root, tmp_path):
    """With the wheel's `mim`, and a `pip` that only finds out what it would have to install."""
    pytest.importorskip("mmdet")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("mim", "pip"):
        (programs / name).write_text(f'#!/bin/sh\nexec "{fresh_python}" -m {name} "$@"\n')
        (programs / name).chmod(0o755)
    (source,) = filter(Path.is_dir, wheel.parent.glob("mmsoft-*"))
    # Nothing from the index: what `.[all]` names is in this environment.
    settings = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    settings["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    output = follow(template, root, tmp_path, source, **settings)
    assert "Would install mmsoft-" in output
    assert "does not provide the extra" not in output


def test_what_the_templates_readme_exempts_is_the_trial_on_a_gpu(template, root):
    # What the text names in passing has no arguments that could be wrong.
    named = set(re.findall(r"`((?:mim|pip|python|make|docker|bash) [^`]*)`", template))
    assert named == {"mim test", "mim train mmsoft", "mim train mmdet", "mim train mmseg"}
    tested, exempt = commands(template)
    trial = "\n".join(command for command in tested if re.match("mim (train|test)", command))
    for old, new in (("_trial", "_mydata"), ("--gpus 0", "--gpus 1"), ("epoch_1.", "epoch_12.")):
        trial = trial.replace(old, new)
    *ours, fine_tuning = exempt
    assert ours == trial.splitlines()
    pytest.importorskip("mmdet")
    config = Config.fromfile(root / "projects/template/configs/retinanet_softpp-t_mydata.py")
    assert config.train_cfg.max_epochs == 12
    words = fine_tuning.split()
    options = dict(word.split("=") for word in words[words.index("--cfg-options") + 1 :])
    config.merge_from_dict(options)
    init_cfg = dict(type="Pretrained", checkpoint="SOFT_Tiny_norm.pth")
    assert config.model.backbone.init_cfg == init_cfg
    assert config.model.backbone.norm_eval
    assert " ".join(words[:6]) == " ".join(ours[0].split()[:6])


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("mmdet", "retinanet_softpp-t_coco"),
        pytest.param("mmdet", "retinanet_stock", marks=pytest.mark.long),
        pytest.param("mmseg", "upernet_stock", marks=pytest.mark.long),
    ],
)
def test_project_trains_with_the_wheel_and_no_pythonpath(
    library, name, fresh_python, root, tmp_path
):
    pytest.importorskip(library)
    project = tmp_path / "project"
    shutil.copytree(root / "projects/template", project)
    if library == "mmdet":
        make_coco(project)
    else:
        make_ade20k(project)
    length = "train_cfg.max_epochs=1" if library == "mmdet" else "train_cfg.max_iters=2"
    command = [fresh_python, "-m", "mim", "train", library, f"configs/{name}.py", "--gpus", "0"]
    output = train_two_steps(command, project, length, *OPTIONS[name])

    # The config as it was resolved: our backbone, and no trace of the repository.
    resolved = (project / "work" / f"{name}.py").read_text()
    assert "type='mmsoft.SOFTPlusPlus'" in resolved
    for folder in ("mmsoft", "configs"):
        assert str(root / folder) not in output
