"""Multiply-adds: of our operators, of the backbones, and through the tools of every library."""

import os
import re
import sys
from functools import partial
from pathlib import Path

import fault_runs
import pytest
import torch
from mini_models import LIBRARIES, import_library
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn

from mmsoft import flops, ops
from mmsoft.analysis import capture
from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention

PUBLISHED = dict(tiny=1.9, small=3.3, medium=7.2, large=11.0, huge=16.3)


@pytest.fixture(autouse=True)
def _quiet():
    """MMEngine warns once for each operator that it does not count."""
    MMLogger.get_current_instance().setLevel("ERROR")


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def macs(function, *shapes):
    analysis = FlopAnalyzer(Call(function), tuple(torch.rand(shape) for shape in shapes))
    return dict(analysis.by_operator())


def macs_of_layer(layer, tokens, grid):
    forward = layer.forward
    layer.forward = lambda x: forward(x, grid)
    return dict(FlopAnalyzer(layer, torch.rand(tokens)).by_operator())


def test_gaussian_kernel_product():
    """2 samples, 3 heads: 5x4 exponents of 6 channels, times 7 columns; either side the longer."""
    long = macs(ops.gaussian_kernel_product, (2, 3, 5, 6), (2, 3, 4, 6), (2, 3, 4, 7))
    short = macs(ops.gaussian_kernel_product, (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7))
    assert long == short == dict(gaussian_kernel_product=2 * 3 * 5 * 4 * (6 + 7))


@pytest.mark.parametrize("steps", [1, 20])
def test_newton_raphson(steps):
    def invert(a, alpha):
        return ops.newton_raphson_pinv(a, alpha, alpha, steps)

    products = 2 * steps + 2
    expected = dict(newton_raphson_pinv=2 * 3 * products * 4**3)
    assert macs(invert, (2, 3, 4, 4), (2, 3, 1, 1)) == expected


def test_direct_solve():
    found = macs(ops.tikhonov_pinv_product, (2, 3, 6, 6), (2, 3, 6, 5))
    assert found.pop("matmul") == 2 * 3 * 6 * 6 * 5  # A b
    assert found == dict(tikhonov_solve=2 * 3 * (6**3 + 6**3 // 6 + 6 * 6 * 5))


def test_softmax_attention():
    assert macs_of_layer(SoftmaxAttention(64, 2), (3, 10, 64), (3, 3)) == dict(
        linear=3 * 10 * 64 * (64 + 128 + 64), matmul=3 * 2 * 10 * 10 * (32 + 32)
    )


@pytest.mark.parametrize(("budget", "m"), [(None, 4 * 6), (16, 4 * 4)])
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_attention_layer(solver, budget, m):
    """Every product of the layer: 16x24 tokens, 64 channels in 2 heads, 4x6 landmarks."""
    layer = SoftmaxFreeAttention(64, 2, 4, 5, normalize=True, max_landmarks=budget, solver=solver)
    n, heads, d = 16 * 24, 2, 32
    found = macs_of_layer(layer, (1, n, 64), (16, 24))
    assert found.pop("linear") == 3 * n * 64 * 64 + heads * m * (4 * 4 * d) * d
    assert found.pop("conv") == n * 64 * 5 * 5
    assert found.pop("gaussian_kernel_product") == 2 * heads * n * m * (d + d)
    assert found.pop("layer_norm") == 5 * heads * m * d
    gram, rows = heads * m * m * d, heads * m * m  # A; the guard's A (A 1)
    if solver == "newton":
        assert found.pop("newton_raphson_pinv") == heads * 42 * m**3
        assert found.pop("newton_step_size") == rows
        assert found.pop("matmul") == gram + heads * m * m * d  # and A+ s
    else:
        assert found.pop("tikhonov_solve") == heads * (m**3 + m**3 // 6 + m * m * d)
        assert found.pop("matmul") == gram + heads * m * m * d  # and A s
    assert found == {}


@pytest.mark.parametrize("budget", [None, 7])
def test_layer_with_landmarks_by_content(budget):
    """No convolution; the means of all 4x6 candidates, then of those that were chosen."""
    options = dict(normalize=True, max_landmarks=budget, landmarks="content")
    layer = SoftmaxFreeAttention(64, 2, 4, 5, **options)
    n, heads, d, candidates = 16 * 24, 2, 32, 24
    m = budget or candidates
    found = macs_of_layer(layer, (1, n, 64), (16, 24))
    chosen = heads * candidates * m * d + heads * candidates * m * (m - 1) // 2
    assert found["landmark_choice"] == chosen
    assert found["linear"] == 3 * n * 64 * 64
    means = heads * (candidates + m) * 4 * 4 * d
    assert found["matmul"] == means + 2 * heads * n * m * (d + d)
    assert found.keys() == {"landmark_choice", "linear", "matmul", "conv"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("tiny", "huge") else [pytest.mark.long])
        for name in PUBLISHED
    ],
)
def test_published_flops(name):
    """The authors do not count the iteration."""
    backbone = (SOFT if name == "tiny" else SOFTPlusPlus)(name, landmarks="released").eval()
    heads = sum(b.attn.num_heads for stage in backbone.stages[:3] for b in stage.blocks)
    analysis = FlopAnalyzer(backbone, torch.rand(1, 3, 224, 224))
    iteration = analysis.by_operator()["newton_raphson_pinv"]
    assert iteration == heads * 42 * 49**3
    assert (analysis.total() - iteration) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.05)


def test_averaged_keys():
    """Of an image too large for its keys: 3x2 tokens of stage 4 become 2x2, and a class token."""
    found = []
    for keys in (None, 4):
        torch.manual_seed(0)
        backbone = SOFTPlusPlus("tiny", max_keys=keys).eval()
        found.append(FlopAnalyzer(backbone, torch.rand(1, 3, 96, 64)).by_operator())
    channels, blocks = backbone.arch_settings["embed_dims"][3], len(backbone.stages[3].blocks)
    saved = {name: found[0][name] - found[1][name] for name in found[0]}
    assert saved.pop("linear") == blocks * 2 * 2 * channels**2
    assert saved.pop("matmul") == blocks * 2 * 2 * 7 * channels
    assert not any(saved.values())


@pytest.mark.parametrize("library", LIBRARIES)
def test_get_flops_tool(library, run_tool, tmp_path):
    import_library(library)
    config = tmp_path / "config.py"
    model = LIBRARIES[library](max_landmarks=16, landmarks="released")
    Config(dict(default_scope=library, model=model)).dump(config)
    tool = partial(run_tool, "analysis_tools/get_flops.py", config, "--shape")
    status, printed, _ = tool(224, 160)
    assert status == 0
    table = dict(re.findall(r"^ *(\w+) +([\d.]+)", printed, re.MULTILINE))
    kwargs = {k: v for k, v in model["backbone"].items() if k not in ("type", "out_type")}
    alone = FlopAnalyzer(SOFTPlusPlus(**kwargs).eval(), torch.rand(1, 3, 224, 160)).total()
    assert float(table["backbone"]) == pytest.approx(alone / 1e9, abs=6e-4)
    assert float(table["newton_raphson_pinv"]) > 0
    assert float(table["model"]) >= float(table["backbone"])
    assert "--shape takes one or two positive numbers, got [1, 2, 3]" in tool(1, 2, 3)[2]


@pytest.mark.parametrize("library", ["mmdet", "mmpretrain"])
def test_get_flops_of_the_libraries(library, tmp_path, root, shapes, run_outside):
    """`mim run LIBRARY get_flops CONFIG` counts what we count."""
    import_library(library)
    mim, shape = Path(sys.executable).with_name("mim"), (96, 128)
    if library == "mmdet":  # which takes the images of the data set
        resized = {"val_dataloader.dataset.pipeline.1.scale": shape[::-1]}
        config = fault_runs.config(root, shapes, "retinanet", tmp_path, changes=resized)
        arguments = ()
    else:
        config = Config(dict(default_scope=library, model=LIBRARIES[library]()))
        arguments = ("--shape", *shape)
    config.dump(tmp_path / "config.py")
    done = run_outside(
        mim,
        *("run", library, "get_flops", tmp_path / "config.py", *arguments),
        PYTHONPATH=str(root),
        PATH=f"{mim.parent}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    (counted, unit) = re.search(r"Flops: ([\d.]+)([GM])", done.stdout + done.stderr).groups()
    model = flops.tensor_model(config, shape)
    image = torch.rand(1, 3, *shape)
    with torch.no_grad(), capture(model) as states:
        model(image)
    # The libraries count with gradients: the means of the chosen patches are made a second time.
    again = sum(
        state.landmarks.shape[2] * state.layer.patch_tokens * state.layer.query.out_features
        for state in states.values()
        if state.present is not None
    )
    analysis = flops.analyse(model, image)
    ours = again + (analysis.total() if library == "mmdet" else analysis.total("backbone"))
    ours /= dict(G=1e9, M=1e6)[unit]
    assert float(counted) == pytest.approx(ours, abs=0.51 * 10 ** -len(counted.partition(".")[2]))
