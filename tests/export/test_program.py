"""torch.export programs, run in a process without MMSOFT."""

import re
import shutil

import pytest
import torch
from mini_models import build
from operators import needs_torch_2_6
from released import SMALL

from mmsoft.export import Input, export_program, exportable
from mmsoft.export.bodies import choose
from mmsoft.export.program import compare, record, sizes_of
from mmsoft.models import SOFTPlusPlus
from mmsoft.models.padding import inside
from mmsoft.ops import choose_landmarks

ANY = dict(dynamic_size=True, dynamic_batch=True)

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
            ANY,
            marks=pytest.mark.long,
        ),
        pytest.param(dict(max_landmarks=9, max_keys=64), ANY, marks=pytest.mark.long),
        pytest.param(dict(max_landmarks=None, out_indices=(0,)), ANY, marks=pytest.mark.long),
        (dict(landmarks="content", max_landmarks=4, out_indices=(0,)), dict()),
        (dict(landmarks="released", norm_cfg=dict(type="BN"), out_indices=(0,)), dict()),
    ],
    ids=str,
)
def test_runs_without_mmsoft(tmp_path, options, inputs):
    module = exportable(Model(**options).eval(), "backbone")
    differences = export_program(module, Input((96, 128), **inputs), tmp_path / "model.pt2")
    assert max(difference.error for difference in differences) < 1e-5
    program = torch.export.load(tmp_path / "model.pt2")
    assert not {name for name in operators(program) if name.startswith("mmsoft")}


@pytest.mark.parametrize(
    "options", [dict(), pytest.param(dict(batch=2), marks=pytest.mark.long)], ids=str
)
def test_any_size_of_a_number_of_images(options):
    """All stages, by content: with ``--dynamic size`` alone, torch knows the number."""
    module = exportable(Model(max_landmarks=9, max_keys=64).eval(), "backbone")
    inputs = Input((96, 128), dynamic_size=True, **options)
    program = record(module, inputs, linear_algebra=True).module()
    for images in inputs.checked(sizes_of(module)):
        with torch.no_grad():
            differences = compare(module.names, images, module(images), program(images))
        assert max(difference.error for difference in differences) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("library", "options"),
    [
        ("mmdet", dict(landmarks="released", max_landmarks=9)),
        ("mmseg", dict()),
        ("mmpretrain", dict(max_landmarks=9, max_keys=64)),
    ],
)
def test_models(tmp_path, library, options):
    inputs = Input((192, 160), **ANY)
    module = exportable(build(library, **options).eval())
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
@pytest.mark.parametrize(
    "options",
    [dict(landmarks="released", solver="direct", max_landmarks=9), dict(max_landmarks=9)],
    ids=str,
)
def test_compiled_ahead_of_time(tmp_path, run_outside, options):
    """AOTInductor's library of one size, in a process without MMSOFT."""
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(landmarks="content"), "landmark_choice"),
        (dict(landmarks="released", solver="newton"), "newton_raphson_pinv"),
        (dict(landmarks="released", solver="direct"), "tikhonov_solve"),
    ],
    ids=str,
)
def test_recorded_and_custom_operators_stay_where_asked(options, expected):
    module = exportable(Model(out_indices=(0,), **options).eval(), "backbone")
    program = record(module, Input((64, 64)), linear_algebra=False)
    found = {name for name in operators(program) if name.startswith("mmsoft")}
    assert found == {f"mmsoft.{expected}"}


@pytest.fixture(scope="module")
def choice():
    """The loop that chooses landmarks, at most 49, of any number of candidates and images."""

    class Choice(torch.nn.Module):
        def forward(self, points, mask):
            return choose(points, 49, 0.1), choose(points, 49, 0.1, mask)

    batch, candidates = torch.export.Dim("batch"), torch.export.Dim("candidates")
    sample = torch.randn(2, 3, 11, 16), torch.ones(2, 11, dtype=torch.bool)
    dims = dict(points={0: batch, 2: candidates}, mask={0: batch, 1: candidates})
    return torch.export.export(Choice(), sample, dynamic_shapes=dims, strict=False)


@pytest.mark.parametrize("candidates", [1, 7, 49, 300, 1050])
@pytest.mark.parametrize("spread", [0.1, 0.5, 2])
def test_choice_in_a_loop(choice, candidates, spread):
    """No file has more than one step of it, and it ends where eager does."""
    assert len(choice.graph.nodes) < 180
    points = torch.randn(2, 3, candidates, 16) * spread + 5
    mask = torch.rand(2, candidates) < 0.7
    mask[0, 0], mask[1] = True, False
    kept = min(candidates, 49)
    for found, expected in zip(
        choice.module()(points, mask),
        (choose_landmarks(points, 49), choose_landmarks(points, 49, mask=mask)),
        strict=True,
    ):
        assert torch.equal(found[0][..., :kept], expected[0])
        assert torch.equal(found[1][..., :kept], expected[1])
        assert not found[1][..., kept:].any()


def test_sizes_that_are_compared_are_on_both_sides_of_max_keys():
    module = exportable(Model(max_keys=64).eval(), "backbone")
    sizes = sizes_of(module)
    assert sizes == (64, 256)
    images = Input((96, 128), **ANY).checked(sizes)
    assert {tuple(x.shape[2:]) for x in images} == {(96, 128), (64, 288), (125, 101)}
    assert {len(x) for x in images} == {1, 2}
    assert [inside(x) is not None for x in images] == [False] * 6 + [True]


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    module = exportable(Model(out_indices=(0,)).eval(), "backbone")
    with pytest.raises(ValueError, match="nothing was written"):
        export_program(module, Input((64, 64)), tmp_path / "model.pt2", tolerance=0)
    assert not list(tmp_path.iterdir())
