"""Several gloo processes on one machine: gradients, sharding, a killed process, a detector."""

import math
import os
import signal
import subprocess
import sys
import time

import distributed_runs as runs
import pytest
import torch
import torch.distributed as dist
from true_layout import make_coco

pytestmark = [
    pytest.mark.cpu(reason="processes of gloo"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]

# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_equal_those_of_one_process(world_size, with_cp, tmp_path):
    runs.launch(world_size, runs.data_parallel_steps, str(tmp_path / "gradients"), with_cp)
    alone = runs.model(seed=0)
    runs.loss(alone(runs.images())).backward()
    expected = runs.gradients(alone)
    for rank in range(world_size):
        got = torch.load(tmp_path / f"gradients-{rank}")
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------- SyncBN


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch's SyncBatchNorm needs GPUs")
def test_sync_batch_norm_sees_the_whole_batch(tmp_path):
    runs.launch(2, runs.sync_batch_norm_steps, str(tmp_path / "gradients"), "cuda")
    alone = runs.model(seed=0, norm_eval=False, norm_cfg=dict(type="BN"))
    runs.loss(alone(runs.images())).backward()
    got = torch.load(tmp_path / "gradients-0", map_location="cpu")
    for name, gradient in runs.gradients(alone).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_sync_batch_norm_without_gpu(tmp_path):
    """A limit of torch: one process on a CPU trains with BatchNorm instead, several cannot."""
    synced = runs.model(norm_eval=False, norm_cfg=dict(type="SyncBN"))
    alone = runs.model(norm_eval=False, norm_cfg=dict(type="BN"))
    for ours, expected in zip(synced(runs.images()), alone(runs.images())):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(Exception, match="SyncBatchNorm layers only work with GPU modules"):
        runs.launch(2, runs.sync_batch_norm_steps, str(tmp_path / "gradients"), "cpu")


# ----------------------------------------------------------------------------------------- FSDP


@pytest.mark.parametrize(
    "steps", [runs.sharded_steps, pytest.param(runs.flexible_runner_steps, marks=pytest.mark.long)]
)
def test_sharded_training_equals_one_process(steps, tmp_path):
    runs.launch(2, steps, str(tmp_path / "losses"))
    alone = runs.model(seed=0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        value = runs.loss(alone(runs.images()))
        value.backward()
        optimizer.step()
        expected.append(float(value))
    assert expected[1] < expected[0]
    assert torch.load(tmp_path / "losses-0") == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- a killed process

WORKER = """
import os, signal
import distributed_runs
import torch.distributed as dist
from distributed_runs import images, loss, model
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
module = DistributedDataParallel(model())
for iteration in range(1000):
    if iteration == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss(module(images()[rank : rank + 1])).backward()
    if rank == 0:
        print("iteration", iteration, flush=True)
"""


@pytest.mark.long
def test_a_killed_rank_ends_the_job_with_an_error(tmp_path):
    """Under torch's launcher, which `mim train --launcher pytorch` calls."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(tmp_path / "worker.py"))
    path = os.pathsep.join([os.path.dirname(runs.__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0
    assert "iteration 1\n" in done.stdout  # it ran
    assert "iteration 999" not in done.stdout
    assert f"Signal {signal.SIGKILL.value}" in done.stderr, done.stderr[-3000:]
    print(f"the job ended after {time.monotonic() - began:.0f} s in all")


# ------------------------------------------------------------- a detector through the runner

# Two processes train a detector as one process with twice the batch does.
#
# RetinaNet from our config, without what makes the two differ legitimately: random flips,
# stochastic depth and shuffling are disabled, and the number of positive anchors by which the loss
# is divided is that of all processes (see average_positives). In float64.
#
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
    return whole[0] / whole[1], max(far / max(norm, 1e-12) for far, norm in squares.values())


@pytest.mark.long
def test_two_gloo_processes_equal_one_with_twice_the_batch(root, tmp_path, monkeypatch):
    pytest.importorskip("mmdet")
    make_coco(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(root=root))

    def train(processes):
        runs.launch(processes, runs.detector_steps, "config.py", f"{processes}")
        return [torch.load(f"{processes}-{rank}") for rank in range(processes)]

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
