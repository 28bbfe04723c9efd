"""The profile of a config's backbone."""

import re
from functools import partial

import pytest
import torch
from loading import load_tool

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.layers import SOFTBlock

profile_operators = load_tool("analysis_tools/profile_operators.py")
CONFIG = """
default_scope = "mmengine"
arch = dict(depths=[1, 1, 1, 1], embed_dims=[32, 32, 32, 32], num_heads=[1, 1, 1, 1])
model = dict(backbone=dict(type="mmsoft.SOFTPlusPlus", arch=arch))
"""


@pytest.fixture
def profile(run_tool, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return partial(run_tool, "analysis_tools/profile_operators.py", tmp_path / "config.py")


def test_times_add_up_and_the_rest_is_summed(profile):
    _, printed, _ = profile("--shape", "64", "96", "--top", "5")
    head, *rows, total = printed.splitlines()
    assert head.split() == ["operator", "calls", "ms", "share"]
    assert len(rows) == 6
    assert rows[-1].startswith("the rest")
    times = [float(row.split()[-2]) for row in rows]
    assert times[:-1] == sorted(times[:-1], reverse=True)
    assert sum(times) == pytest.approx(float(total.split()[-1]), abs=0.5)
    assert any(row.startswith("addmm") for row in profile("--top", "200")[1].splitlines())


def test_causes_stand_beside_the_best_matrix_product(profile):
    _, printed, _ = profile("--shape", "64", "96", "--causes")
    table, last = printed.strip().split("\n\n")
    head, *rows, total = table.splitlines()
    assert head.split() == ["cause", "ms", "share", "GMACs", "ms", "at", "best", "of", "best"]
    assert len(rows) == 7
    times = [float(re.search(r"([\d.]+) +[\d.]+%", row)[1]) for row in rows]
    assert rows[0].startswith("attention")
    assert times[0] > 0
    assert sum(times) == pytest.approx(float(total.split()[1]), abs=0.5)
    assert all(row.rstrip().endswith("%") for row in (*rows[1:3], total))
    assert re.search(r" ms without the profiler: [\d.]+% of [\d.]+ TFLOP/s$", last, re.M)
    assert re.search(
        r"\n[\d.]+ ms of processor time, [\d.]+ ms of it in the sys.* \d+ page faults$", last
    )


def test_faults_of_fresh_memory_are_counted():
    """A tensor of 64 MiB is given back to the system, and asked for anew each time."""

    def fresh(images):
        return torch.ones(1 << 24)

    kept = torch.ones(1 << 24)
    fresh(None)
    *_, faults = profile_operators.of_the_system(fresh, None)
    *_, none = profile_operators.of_the_system(lambda images: kept.mul_(1), None)
    assert faults >= 32  # of 2 MiB, at most
    assert none < 8


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("addmm", "matrix"),
        ("mm", "matrix"),
        ("mkldnn_convolution", "convolutions"),
        ("attention of addmm", "attention"),
        ("attention of exp_", "attention"),
        ("mmsoft::gaussian_kernel_product", "attention"),
        ("_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("native_layer_norm", "normalization"),
        ("addcmul", "element-wise"),
        ("copy_", "copies"),
        ("expand", "small"),
        ("upsample_bilinear2d", "small"),
        ("resolve_conj", "small"),
    ],
)
def test_every_operator_has_one_cause(name, first):
    assert profile_operators.cause(name).startswith(first)


def test_what_attention_layers_call_is_attention():
    """All of it, whatever its name, and nothing of what they are given."""
    layer = SoftmaxFreeAttention(16, 2, 2, 3, normalize=True, landmarks="content").eval()
    methods = dict(vars(SoftmaxFreeAttention))
    q, v = torch.randn(2, 1, 20, 16)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer.attend(x.exp().log(), v, (4, 5))

    rows = profile_operators.measure(Model(), q, mark=True)
    outside = {name for name, *_ in rows if not name.startswith("attention of ")}
    assert {"exp", "log"} <= outside
    assert not outside & {"bmm", "exp_", "softmax", "_softmax", "clamp_", "sub_", "gather"}
    assert sum(ms for name, _, ms in rows if name not in outside) > 0
    assert vars(SoftmaxFreeAttention) == methods


def test_attention_by_part_is_attention():
    """Where a block reads from landmarks part by part, and its MLP is fused."""
    layer = SoftmaxFreeAttention(16, 2, 2, 3, normalize=True, landmarks="content")
    block = SOFTBlock(16, layer, 0.0, 0.0).eval()
    block.part_elements = 16 * 8

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x, (4, 5))

    rows = profile_operators.measure(Model(), torch.randn(1, 20, 16), mark=True)
    calls = {name: count for name, count, _ in rows}
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert calls["attention of " + fused] == 1 + 3  # gathered once, read for 8, 8 and 4 tokens
    assert fused not in calls
    products = [n for n in calls if n.endswith("_linear_pointwise")]
    assert [profile_operators.cause(n) for n in products] == ["matrix products of linear layers"]


def test_products_by_cause_are_those_counted():
    rows = [("addmm", 1, 4.0), ("mkldnn_convolution", 1, 2.0), ("copy_", 1, 2.0)]
    macs = dict(linear=1e9, conv=0.25e9, matmul=0.75e9)
    table = {row[0]: row[1:] for row in profile_operators.by_cause(rows, macs, tflops=1.0)}
    assert table["matrix products of linear layers"] == [4.0, "50.0%", 1.0, 2.0, "50%"]
    assert table["convolutions"] == [2.0, "25.0%", 0.25, 0.5, "25%"]
    assert table["copies and changes of layout"] == [2.0, "25.0%", None, None, None]
    assert table["sum"] == [8.0, None, 2.0, 4.0, "50%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--shape", "1", "2", "3"), "--shape takes one or two"), (("--top", "0"), "--top take pos")],
)
def test_bad_arguments_are_one_line(profile, arguments, words):
    status, _, errors = profile(*arguments)
    assert status == 2
    assert words in errors
