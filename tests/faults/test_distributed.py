"""Several gloo processes on one machine: gradients, checkpointing, sharding, a death."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed_runs import (
    data_parallel_steps,
    flexible_runner_steps,
    free_port,
    gradients,
    images,
    launch,
    loss,
    model,
    sharded_steps,
    sync_batch_norm_steps,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")

# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_equal_those_of_one_process(world_size, with_cp, tmp_path):
    launch(world_size, data_parallel_steps, str(tmp_path / "gradients"), with_cp)
    alone = model(seed=0)
    loss(alone(images())).backward()
    expected = gradients(alone)
    for rank in range(world_size):
        got = torch.load(tmp_path / f"gradients-{rank}")
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------- SyncBN


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch's SyncBatchNorm needs GPUs")
def test_sync_batch_norm_sees_the_whole_batch(tmp_path):
    launch(2, sync_batch_norm_steps, str(tmp_path / "gradients"), "cuda")
    alone = model(seed=0, norm_eval=False)
    loss(alone(images())).backward()
    got = torch.load(tmp_path / "gradients-0", map_location="cpu")
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_sync_batch_norm_without_gpu(tmp_path):
    """A limit of torch: one process on a CPU trains with BatchNorm instead, several cannot."""
    synced = model(norm_eval=False, norm_cfg=dict(type="SyncBN"))
    for ours, expected in zip(synced(images()), model(norm_eval=False)(images())):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(Exception, match="SyncBatchNorm layers only work with GPU modules"):
        launch(2, sync_batch_norm_steps, str(tmp_path / "gradients"), "cpu")


# ----------------------------------------------------------------------------------------- FSDP


@pytest.mark.parametrize(
    "steps",
    [
        (sharded_steps, "fully_shard"),
        pytest.param((sharded_steps, "MMFullyShardedDataParallel"), marks=pytest.mark.long),
        pytest.param((flexible_runner_steps,), marks=pytest.mark.long),
    ],
    ids=lambda steps: "-".join([steps[0].__name__, *steps[1:]]),
)
def test_sharded_training_equals_one_process(steps, tmp_path):
    launch(2, steps[0], str(tmp_path / "losses"), *steps[1:])
    alone = model(seed=0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(alone(images()))
        value.backward()
        optimizer.step()
        expected.append(float(value))
    assert expected[1] < expected[0]
    assert torch.load(tmp_path / "losses-0") == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------- a death

WORKER = """
import os, signal
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
def test_one_dead_rank_ends_the_job_with_an_error(tmp_path):
    """Under torch's launcher, which `mim train --launcher pytorch` calls."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", str(tmp_path / "worker.py")]
    began = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path]),
        },
    )
    assert done.returncode != 0
    assert "iteration 1\n" in done.stdout  # it ran
    assert "iteration 999" not in done.stdout
    assert f"Signal {signal.SIGKILL.value}" in done.stderr, done.stderr[-3000:]
    print(f"the job ended after {time.monotonic() - began:.0f} s in all")
