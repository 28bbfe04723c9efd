"""Train a config for its length in N gloo processes, or in one, and write what happened.

    python tests/helpers/distributed_worker.py CONFIG OUT --processes 2

OUT/rank{r}.pth holds, per iteration, the losses of that process, its number of positive anchors and
the gradients that the optimizer was handed; and the final parameters. MMEngine's own launcher
insists on CUDA (`init_dist` calls `torch.cuda.set_device`), so the process group is opened here;
everything after that is MMEngine's: its runner, sampler and MMDistributedDataParallel. All
is in float64: in float32 a different rounding can change the sign of an input of a ReLU, which
would look like a fault.
"""

import argparse
import os
from pathlib import Path

import torch
from mmdet.utils import reduce_mean
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner


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
    own, get_targets = [], head.get_targets

    def averaged(*args, **kwargs):
        *targets, positives = get_targets(*args, **kwargs)
        own.append(positives)
        return *targets, float(reduce_mean(torch.tensor(float(positives))))

    head.get_targets = averaged
    return own


def train(rank, processes, config, out):
    """Train as process `rank` of `processes`."""
    torch.set_default_dtype(torch.float64)
    cfg = Config.fromfile(config)
    cfg.work_dir = str(out / "work")
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        store = f"file://{(out / 'store').resolve()}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=processes
        )
        cfg.launcher = "pytorch"
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
        cfg.train_dataloader.batch_size //= processes
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if processes > 1 else runner.model
    positives = average_positives(model.bbox_head)
    recorder = Recorder()
    runner.register_hook(recorder)
    runner.train()
    wrapper = type(runner.model).__name__
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(
        dict(
            losses=recorder.losses,
            positives=positives,
            gradients=recorder.gradients,
            parameters=parameters,
            wrapper=wrapper,
        ),
        out / f"rank{rank}.pth",
    )
    if processes > 1:
        torch.distributed.destroy_process_group()


def main():
    """Read the command line and start the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    if args.processes == 1:
        train(0, 1, args.config, args.out)
    else:
        work = (args.processes, args.config, args.out)
        torch.multiprocessing.spawn(train, work, nprocs=args.processes)


if __name__ == "__main__":
    main()
