"""Real training runs on generated data, small and in this process."""

import itertools

import numpy as np
import torch
from loading import load_config
from mmengine.runner import Runner
from released import SMALL

CONFIGS = {
    "mask_rcnn": ("mmdet", "mask-rcnn_softpp-mini_fpn_shapes.py"),
    "retinanet": ("mmdet", "retinanet_softpp-mini_fpn_shapes.py"),
    "upernet": ("mmseg", "upernet_softpp-mini_shapes.py"),
}
SOFTPP = dict(type="mmsoft.SOFTPlusPlus", arch=SMALL)
# Of similar size: 1.2 M parameters, where SOFTPP has 0.8 M.
SWIN = dict(
    type="SwinTransformer", embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8),
    window_size=7, drop_path_rate=0.0,
)  # fmt: skip
_numbers = itertools.count()


def config(root, folder, name, work_dir, *, backbone=None, changes=None, iterations=2):
    """A config of the demo, cut to `iterations` iterations of two images and nothing else.

    `name` is one of CONFIGS; `changes` is merged last.
    """
    library, file = CONFIGS[name]
    config = load_config(root / "configs/demo" / file)
    backbone = dict(backbone or SOFTPP)
    dims = [32, 64, 96, 128]
    if backbone["type"] == "SwinTransformer":
        backbone["type"], dims = f"{library}.SwinTransformer", [32, 64, 128, 256]
    if "out_indices" in config.model.backbone:
        backbone["out_indices"] = config.model.backbone.out_indices
        dims = [dims[i] for i in backbone["out_indices"]]
    config.model.backbone = backbone
    if library == "mmseg":
        config.model.data_preprocessor.size = (64, 64)
        config.model.decode_head.update(in_channels=dims, channels=16)
        config.model.auxiliary_head.update(in_channels=dims[2], channels=16)
    else:
        config.model.neck.in_channels = dims
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        data_root = folder / loader.dataset.data_root
        loader.dataset.data_root = str(data_root)
        if library == "mmdet":
            loader.dataset.filter_cfg = dict(filter_empty_gt=False)
    if library == "mmdet":
        annotations = str(folder / config.val_evaluator.ann_file)
        config.val_evaluator.ann_file = config.test_evaluator.ann_file = annotations
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_begin=10**6)
    config.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=False)
    config.train_dataloader.pop("batch_sampler", None)
    config.param_scheduler = None
    config.default_hooks.checkpoint = dict(
        type="mmsoft.CheckpointHook", by_epoch=False, save_last=False
    )
    config.default_hooks.logger.interval = 1
    config.log_processor.by_epoch = False
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=0)
    config.log_level = "WARNING"
    # MMEngine keeps loggers and visualizers by name until the process ends.
    config.experiment_name = config.visualizer.name = f"faults-{next(_numbers)}"
    config.merge_from_dict(changes or {})
    return config


def train(config):
    """Train; returns the runner and the losses of every iteration."""
    runner = Runner.from_cfg(config)
    runner.train()
    losses, _ = runner.message_hub.get_scalar("train/loss").data
    return runner, losses.tolist()


def plain_loop(cfg, iterations, dtype=None, seed=0):
    """The losses of AdamW at 1e-3 without MMEngine's wrapper, whose AMP needs a GPU.

    The seed decides the order of the images only, not the weights.
    """
    cfg.train_dataloader.sampler.update(seed=seed, shuffle=True)
    runner = Runner.from_cfg(cfg)
    torch.manual_seed(0)
    runner.model.init_weights()
    model, loader = runner.model.train(), iter(runner.train_dataloader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(iterations):
        data = model.data_preprocessor(next(loader), True)
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss, _ = model.parse_losses(model(**data, mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    assert weights_are_finite(runner)
    return np.array(losses)


def weights_are_finite(runner):
    return all(p.isfinite().all() for p in runner.model.parameters())
