"""torch.export programs, run in a process without MMSOFT."""

import re
import shutil

import pytest
import torch
from mini_models import build
from operators import needs_torch_2_6
from released import SMALL

from mmsoft.export import Input, export_program, exportable
from mmsoft.export.program import record
from mmsoft.models import SOFTPlusPlus

pytestmark = needs_torch_2_6


class Model(torch.nn.Module):
    """A backbone where OpenMMLab's models have it."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = SOFTPlusPlus(SMALL, **options)


def operators(program):
    """Names of all that is called, also in the parts that torch keeps apart for autocast."""
    modules = (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    nodes = (node for module in modules for node in module.graph.nodes)
    return {str(node.target).removesuffix(".default") for node in nodes}


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        pytest.param(
            dict(landmarks="released", solver="direct", max_landmarks=9, out_indices=(1,)),
            dict(dynamic_size=True, dynamic_batch=True),
            marks=pytest.mark.long,
        ),
        (dict(landmarks="content", max_landmarks=4, out_indices=(0,)), dict()),
    ],
    ids=str,
)
def test_runs_without_mmsoft(tmp_path, options, inputs):
    module = exportable(Model(**options).eval(), "backbone")
    differences = export_program(module, Input((96, 128), **inputs), tmp_path / "model.pt2")
    assert max(difference.error for difference in differences) < 1e-5
    program = torch.export.load(tmp_path / "model.pt2")
    assert not {name for name in operators(program) if name.startswith("mmsoft")}


@pytest.mark.long
@pytest.mark.parametrize("library", ["mmdet", "mmseg", "mmpretrain"])
def test_models(tmp_path, library):
    inputs = Input((192, 160), dynamic_size=True, dynamic_batch=True)
    module = exportable(build(library, landmarks="released", max_landmarks=9).eval())
    differences = export_program(module, inputs, tmp_path / "model.pt2")
    assert max(difference.error for difference in differences) < 1e-5


@pytest.mark.parametrize("found", ["2.1.2+cu121", "2.5.1"])
def test_older_torch_is_named(monkeypatch, tmp_path, found):
    monkeypatch.setattr(torch, "__version__", found)
    module = exportable(Model(out_indices=(0,)).eval(), "backbone")
    with pytest.raises(ImportError, match=rf"needs torch>=2\.6, but torch {re.escape(found)} is"):
        export_program(module, Input(), tmp_path / "model.pt2")


LOADED = """
import sys, torch
images, expected = torch.load("case.pt")
found = torch._inductor.aoti_load_package("compiled.pt2")(images)
assert "mmsoft" not in sys.modules
for ours, theirs in zip(expected, found, strict=True):
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_compiled_ahead_of_time(tmp_path, run_outside):
    """AOTInductor's library of one size, in a process without MMSOFT."""
    options = dict(landmarks="released", solver="direct", max_landmarks=9)
    module = exportable(Model(**options).eval(), "backbone")
    inputs = Input((96, 128))
    export_program(module, inputs, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    images = inputs.images(1, inputs.shape)
    with torch.no_grad():
        torch.save((images, [output.clone() for output in module(images)]), tmp_path / "case.pt")
    done = run_outside("-c", LOADED)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("by_content", [False, True])
def test_recorded_and_custom_operators_stay_where_asked(by_content):
    module = exportable(
        Model(landmarks="content" if by_content else "released", out_indices=(0,)).eval(),
        "backbone",
    )
    program = record(module, Input((64, 64)), linear_algebra=False)
    expected = "mmsoft.landmark_choice" if by_content else "mmsoft.newton_raphson_pinv"
    assert {name for name in operators(program) if name.startswith("mmsoft")} == {expected}


def test_by_content_of_any_size_is_refused(tmp_path):
    module = exportable(Model(landmarks="content").eval(), "backbone")
    with pytest.raises(ValueError, match="records for one size: export without a dynamic size"):
        export_program(module, Input(dynamic_size=True), tmp_path / "model.pt2")


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    module = exportable(Model(out_indices=(0,)).eval(), "backbone")
    with pytest.raises(ValueError, match="nothing was written"):
        export_program(module, Input((64, 64)), tmp_path / "model.pt2", tolerance=0)
    assert not list(tmp_path.iterdir())
