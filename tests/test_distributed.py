"""Two processes train a detector as one process with twice the batch does.

RetinaNet from our config, unchanged but for what would make the two differ by right: random flips,
stochastic depth and shuffling are off, and the number of positive anchors by which the loss is
divided is that of all processes (see average_positives). In float64.
"""

import math
import subprocess
import sys

import pytest
from true_layout import make_coco

torch = pytest.importorskip("torch")

# The rate neither warms up nor is small, so that the second iteration shows a fault of the first.
CONFIG = """
_base_ = "{root}/configs/retinanet/retinanet_softpp-t_fpn_1x_coco.py"
model = dict(backbone=dict(drop_path_rate=0.0))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(shuffle=False),
    dataset=dict(data_root="data/coco/", filter_cfg=dict(min_size=1), pipeline=train_pipeline),
)
train_cfg = dict(max_epochs=1)
val_cfg = val_dataloader = val_evaluator = None
param_scheduler = []
default_hooks = dict(checkpoint=None)
randomness = dict(seed=0)
"""


def distance(one, other):
    """The relative distance of two dicts' tensors, taken as one vector each, and the largest."""
    assert one.keys() == other.keys()
    squares = {k: (float((one[k] - other[k]).norm()), float(other[k].norm())) for k in one}
    whole = [math.hypot(*values) for values in zip(*squares.values(), strict=True)]
    return whole[0] / whole[1], max(off / max(norm, 1e-12) for off, norm in squares.values())


@pytest.mark.long
def test_two_gloo_processes_equal_one_with_twice_the_batch(root, tmp_path):
    pytest.importorskip("mmdet")
    make_coco(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(root=root))

    def train(processes):
        script = root / "tests/distributed_worker.py"
        command = [sys.executable, script, "config.py", f"{processes}", f"--processes={processes}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        files = [tmp_path / f"{processes}/rank{rank}.pth" for rank in range(processes)]
        return [torch.load(file) for file in files]

    (single,) = train(1)
    first, second = train(2)
    assert first["wrapper"] == "MMDistributedDataParallel"
    assert len(single["gradients"]) == len(first["gradients"]) == 2
    for iteration in range(2):
        # Each process saw its own image, with its own number of boxes ...
        ours = [rank["losses"][iteration]["loss"] for rank in (first, second)]
        positives = [rank["positives"][iteration] for rank in (first, second)]
        assert positives[0] != positives[1]
        assert sum(positives) == single["positives"][iteration]
        assert abs(ours[0] - ours[1]) > 1e-2 * ours[0]
        # ... and the mean is what one process with both sees. Not closer, because MMDetection adds
        # 1.2e-7 to the number by which it divides.
        assert sum(ours) / 2 == pytest.approx(single["losses"][iteration]["loss"], rel=1e-7)
        whole, largest = distance(first["gradients"][iteration], single["gradients"][iteration])
        assert whole < 1e-7
        assert largest < 1e-6  # of a single tensor, however small
    assert distance(first["parameters"], single["parameters"])[0] < 1e-7
    assert distance(first["parameters"], second["parameters"]) == (0, 0)
