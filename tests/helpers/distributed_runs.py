"""What the processes of tests/faults/test_distributed.py do."""

import os
import socket
import sys
from functools import partial
from multiprocessing import forkserver
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loading import load_config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from released import SMALL
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from mmsoft.models import SOFTPlusPlus
from mmsoft.models.layers import SOFTBlock, SoftmaxBlock

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
    """In forks of a process that imports this module once, for all launches."""
    mp.set_forkserver_preload([__name__])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where it finds it
        forkserver.ensure_running()
    mp.start_processes(
        start,
        (world_size, free_port(), function, *arguments),
        nprocs=world_size,
        start_method="forkserver",
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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


def sync_batch_norm_steps(rank, world_size, file, device):
    module = model(seed=0, norm_eval=False, norm_cfg=dict(type="SyncBN")).to(device)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
    module = DistributedDataParallel(module, find_unused_parameters=False)
    loss(module(images().chunk(world_size)[rank].to(device))).backward()
    torch.save(gradients(module), f"{file}-{rank}")


def sharded_steps(rank, world_size, file):
    """Two steps with the parameters of every block, and of the rest, sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module, mesh = model(seed=0), init_device_mesh("cpu", (world_size,))
    for stage in module.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    share = images().chunk(world_size)[rank]
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(module(share))
        value.backward()
        optimizer.step()
        losses.append(mean_over_ranks(value))
    torch.save(losses, f"{file}-{rank}")


def mean_over_ranks(value):
    value = torch.as_tensor(value).detach().clone()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return BATCH

    def __getitem__(self, index):
        return dict(inputs=images()[index])


class Trained(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = model(seed=0)

    def forward(self, inputs, mode="tensor"):
        return dict(loss=loss(self.backbone(torch.stack(inputs))))


class Losses(Hook):
    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(mean_over_ranks(outputs["loss"]))


def flexible_runner_steps(rank, world_size, file):
    """The same through MMEngine's FlexibleRunner and its strategy for FSDP."""
    losses = Losses()
    wrap = partial(transformer_auto_wrap_policy, transformer_layer_cls={SOFTBlock, SoftmaxBlock})
    runner = FlexibleRunner(
        Trained(),
        work_dir=f"{file}-work",
        strategy=dict(
            type="FSDPStrategy",
            model_wrapper=dict(
                type="MMFullyShardedDataParallel",
                auto_wrap_policy=wrap,
                device_id=torch.device("cpu"),
                use_orig_params=True,
            ),
        ),
        train_dataloader=dict(
            batch_size=BATCH // world_size,
            num_workers=0,
            dataset=Images(),
            sampler=dict(type=DefaultSampler, shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[losses],
        launcher="pytorch",
        randomness=dict(seed=0),
        experiment_name="faults-flexible",
    )
    runner.train()
    torch.save(losses.losses, f"{file}-{rank}")


# ------------------------------------------------------------------------ a detector of MMDetection


class Recorder(Hook):
    """Keep the losses and gradients of every iteration."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def before_train(self, runner):
        names = {p: name.removeprefix("module.") for name, p in runner.model.named_parameters()}

        def keep(optimizer, args, kwargs):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradients.append({names[p]: p.grad.clone() for p in parameters})

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})


def average_positives(head):
    """Divide the loss by the mean of the processes' numbers of positive anchors.

    As MMDetection's ATSS, FCOS and GFL heads do by themselves. RetinaNet's divides by the number of
    its own process, so that the mean over processes is not that of one process.

    Returns:
        The list to which every iteration adds the number of its own process.
    """
    from mmdet.utils import reduce_mean

    own, get_targets = [], head.get_targets

    def averaged(*args, **kwargs):
        *targets, positives = get_targets(*args, **kwargs)
        own.append(positives)
        return *targets, float(reduce_mean(torch.tensor(float(positives))))

    head.get_targets = averaged
    return own


def detector_steps(rank, world_size, config, out):
    """Train a config and write losses, positive anchors, gradients and final parameters.

    MMEngine's launcher calls `torch.cuda.set_device`, so `start` opens the process group. All is in
    float64: in float32 a different rounding can change the sign of an input of a ReLU, which would
    look like a fault.
    """
    torch.set_default_dtype(torch.float64)
    cfg = load_config(config)
    cfg.work_dir = f"{out}-work"
    cfg.launcher = "pytorch"
    cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
    cfg.train_dataloader.batch_size //= world_size
    runner = Runner.from_cfg(cfg)
    positives, recorder = average_positives(runner.model.module.bbox_head), Recorder()
    runner.register_hook(recorder)
    runner.train()
    parameters = {name: p.detach() for name, p in runner.model.module.named_parameters()}
    content = dict(vars(recorder), positives=positives, parameters=parameters)
    torch.save(content | dict(wrapper=type(runner.model).__name__), f"{out}-{rank}")
