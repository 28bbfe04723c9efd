"""Several gloo processes on one machine: gradients, checkpointing, sharding, a death."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from released import ARCH
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmsoft.models import SOFTPlusPlus

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
SMALL = dict(ARCH, depths=[1, 1, 1, 1])
BATCH = 4


def model(seed=0, **options):
    torch.manual_seed(seed)
    # BatchNorm would see another batch in each process; SyncBN is tested below.
    options = dict(norm_eval=True, solver="direct", max_landmarks=16) | options
    return SOFTPlusPlus(SMALL, **options).train()


def images():
    return torch.randn(BATCH, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def loss(outs):
    """A mean over images that every output and every parameter takes part in."""
    return sum((out - 0.1).square().mean() for out in outs)


def gradients(module):
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def start(rank, world_size, port, function, *arguments):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    dist.destroy_process_group()


def launch(world_size, function, *arguments):
    mp.start_processes(
        start,
        (world_size, free_port(), function, *arguments),
        nprocs=world_size,
        start_method="spawn",
    )


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------ gradients


def data_parallel_steps(rank, world_size, file, with_cp):
    """Two steps of DistributedDataParallel, which must see every parameter used."""
    module = DistributedDataParallel(
        model(seed=rank, with_cp=with_cp),  # rank 0's weights win
        find_unused_parameters=False,
    )
    share = images().chunk(world_size)[rank]
    for _ in range(2):
        module.zero_grad()
        loss(module(share)).backward()
    torch.save(gradients(module), f"{file}-{rank}")


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


def sync_batch_norm_steps(rank, world_size, file, device):
    module = model(seed=0, norm_eval=False, norm_cfg=dict(type="SyncBN")).to(device)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
    module = DistributedDataParallel(module, find_unused_parameters=False)
    loss(module(images().chunk(world_size)[rank].to(device))).backward()
    torch.save(gradients(module), f"{file}-{rank}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch's SyncBatchNorm needs GPUs")
def test_sync_batch_norm_sees_the_whole_batch(tmp_path):
    launch(2, sync_batch_norm_steps, str(tmp_path / "gradients"), "cuda")
    alone = model(seed=0, norm_eval=False)
    loss(alone(images())).backward()
    got = torch.load(tmp_path / "gradients-0", map_location="cpu")
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_sync_batch_norm_without_gpu_is_one_clear_error():
    """A limit of torch; MMEngine's Runner falls back to BatchNorm in a single process."""
    from mmengine.model import revert_sync_batchnorm

    module = model(norm_eval=False, norm_cfg=dict(type="SyncBN"))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        module(images())
    reverted = revert_sync_batchnorm(module)
    for ours, expected in zip(reverted(images()), model(norm_eval=False)(images())):
        torch.testing.assert_close(ours, expected)


# ----------------------------------------------------------------------------------------- FSDP


def sharded_steps(rank, world_size, file, kind):
    module = model(seed=0)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for stage in module.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    else:
        from functools import partial

        from mmengine.model import MMFullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        from mmsoft.models.layers import SOFTBlock, SoftmaxBlock

        policy = partial(
            transformer_auto_wrap_policy, transformer_layer_cls={SOFTBlock, SoftmaxBlock}
        )
        module = MMFullyShardedDataParallel(
            module, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    share = images().chunk(world_size)[rank]
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(module(share))
        value.backward()
        optimizer.step()
        dist.all_reduce(value := value.detach().clone())
        losses.append(float(value) / world_size)
    torch.save(losses, f"{file}-{rank}")


@pytest.mark.parametrize("kind", ["fsdp2", "mmengine"])
def test_sharded_training_equals_one_process(kind, tmp_path):
    launch(2, sharded_steps, str(tmp_path / "losses"), kind)
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
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from test_distributed import images, loss, model
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


def test_one_dead_rank_ends_the_job_with_an_error(tmp_path):
    """Under torch's launcher, which `mim train --launcher pytorch` calls."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", str(tmp_path / "worker.py")]
    began = time.monotonic()
    done = subprocess.run(
        [*command, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [os.path.dirname(os.path.dirname(__file__)), *sys.path[1:]]
            ),
        },
    )
    assert done.returncode != 0
    assert "iteration 1\n" in done.stdout  # it ran
    assert "iteration 999" not in done.stdout
    assert f"Signal {signal.SIGKILL.value}" in done.stderr, done.stderr[-3000:]
    print(f"the job ended after {time.monotonic() - began:.0f} s in all")
