"""The command that exports."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from mini_models import mini_classifier
from mmengine.config import Config
from released import SMALL

from mmsoft.analysis import attention_blocks
from mmsoft.builder import build_model

pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))

TOOL = "deployment/export_onnx.py"
TINY = "configs/retinanet/retinanet_softpp-t_fpn_1x_coco.py"


@pytest.fixture
def options():
    """Changes of the classifier's backbone."""
    return dict(solver="direct")


@pytest.fixture
def config(options, tmp_path):
    """A config of the smallest classifier."""
    model = mini_classifier()
    model["backbone"].update(options, arch=SMALL)
    if model["backbone"]["out_indices"] == (0,):
        model["neck"] = dict(type="mmpretrain.GlobalAveragePooling")
        model["head"]["in_channels"] = 32
    path = tmp_path / "config.py"
    path.write_text(f"default_scope = 'mmpretrain'\nmodel = {model!r}\n")
    return path


@pytest.fixture
def model(config, tmp_path):
    """The model of a checkpoint, model.pth."""
    torch.manual_seed(3)
    model = build_model(Config.fromfile(config)).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    return model


def rows(printed):
    """What the table says: images, whether they are padded, output, shape, error."""
    cells = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells[2:]]


FIRST = dict(out_indices=(0,), out_type="featmap")  # a stage, which is exported sooner


@pytest.mark.parametrize("options", [FIRST], ids=str)
def test_program_of_a_checkpoint(run_tool, config, model, tmp_path):
    out = tmp_path / "model.pt2"
    options = ["--format", "pt2", "--shape", "64", "96", "--batch", "2", "--out", out]
    status, printed, errors = run_tool(TOOL, config, tmp_path / "model.pth", *options)
    assert status == 0, errors
    *checked, differences = zip(*rows(printed))
    assert checked == [("2x3x64x96",) * 2, ("no", "yes"), ("logits",) * 2, ("2x3",) * 2]
    assert max(map(float, differences)) < 1e-5
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        (found,) = torch.export.load(out).module()(images)
        torch.testing.assert_close(found, model(images, mode="tensor"), rtol=1e-4, atol=1e-5)


# Released landmarks, of which a budget leaves fewer; by content none are left out here.
PARTS = [dict(FIRST, landmarks="released")]


@pytest.mark.parametrize(
    ("dynamic", "sizes"),
    [
        (["batch"], {"1x3x96x128", "2x3x96x128"}),
        pytest.param(
            ["size", "batch"],
            {f"{n}x3x{size}" for n in (1, 2) for size in ("96x128", "64x224", "125x101")},
            marks=pytest.mark.long,
        ),
    ],
    ids=["batch", "size and batch"],
)
@pytest.mark.parametrize("options", PARTS, ids=str)
def test_onnx_of_a_part(run_tool, config, model, tmp_path, dynamic, sizes):
    """Every argument reaches the file, and so do changes of the config."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "model.onnx"
    options = ["--shape", "96", "128", "--dynamic", *dynamic, "--part", "backbone"]
    options += ["--cfg-options", "model.backbone.max_landmarks=4", "--out", out]
    status, printed, errors = run_tool(TOOL, config, tmp_path / "model.pth", *options)
    assert status == 0, errors
    checked, padded, outputs, shapes, differences = zip(*rows(printed))
    assert {*checked} == sizes
    assert padded == ("no",) * len(sizes) + ("yes",)
    assert {*outputs} == {"stage1"}
    assert shapes[0] == "1x32x24x32"
    assert max(map(float, differences)) < 1e-4
    images = torch.randn(3, 3, *((161, 70) if "size" in dynamic else (96, 128)))
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    found = torch.from_numpy(found)
    for budget, same in ((None, False), (4, True)):
        for layer in attention_blocks(model).values():
            layer.max_landmarks = budget
        with torch.no_grad():
            (expected,) = model.backbone(images)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4) == same


@pytest.mark.long
def test_tiny_takes_less_than_two_minutes(root, tmp_path):
    """Of the processor, in one thread, from the start of the command to the compared file."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    command = [sys.executable, root / "tools" / TOOL, root / TINY, "--part", "backbone"]
    command += ["--cfg-options", "model.backbone.init_cfg=None"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, "--out", tmp_path / "tiny.onnx"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.0f} s")
    assert seconds < 120
    assert (tmp_path / "tiny.onnx").stat().st_size > 40e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "model.pt2"], "--out must end in .onnx, got model.pt2"),
        (["--out", "model.onnx", "--shape", "16"], "shape must be at least 32 pixels a side"),
        (["--out", "model.onnx", "--dynamic", "depth"], "invalid choice: 'depth'"),
        (["--out", "model.onnx", "--part", "neck"], "invalid choice: 'neck'"),
        (["none.pth", "--out", "model.onnx"], "none.pth"),
    ],
)
def test_refusals(run_tool, config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_tool(TOOL, config, *arguments)
    assert status != 0
    assert message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]
