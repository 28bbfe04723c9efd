"""Train and test configs of the Long Range Arena on small data, in one process.

    python lra_runs.py FOLDER CONFIG=DATA_ROOT ... -- KEY=VALUE ...

One line of JSON for each config: the metrics of its test and the losses of its training.
"""

import json
import sys
from pathlib import Path

import torch
from loading import load_config
from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner


def small(path, root, work_dir, changes):
    """The config with a few iterations on the data in a folder."""
    config = load_config(path)
    for split in ("train", "val", "test"):
        if loader := config[f"{split}_dataloader"]:
            loader.update(batch_size=4, num_workers=0, persistent_workers=False)
            loader.setdefault("collate_fn", dict(type="default_collate"))  # as MMPreTrain's tools
            loader.dataset.data_root = root
    config.train_cfg.update(max_iters=3, val_interval=3)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.interval = 2
    config.work_dir = str(work_dir)
    config.merge_from_dict(changes)
    return config


def main():
    torch.set_num_threads(1)
    end = sys.argv.index("--")
    folder, *configs = sys.argv[1:end]
    changes = {
        key: DictAction._parse_iterable(value)
        for key, value in (change.split("=", 1) for change in sys.argv[end + 1 :])
    }
    init_default_scope("mmpretrain")
    for number, pair in enumerate(configs):
        path, root = pair.rsplit("=", 1)
        work_dir = Path(folder) / str(number)
        config = small(path, root, work_dir, changes)
        runner = Runner.from_cfg(config)
        runner.train()
        metrics = runner.test()
        scalars = min(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()
        entries = [json.loads(line) for line in scalars]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        steps = [entry["step"] for entry in entries if "accuracy/top1" in entry]
        kept = sorted(file.name for file in work_dir.glob("*.pth"))
        print(
            json.dumps(dict(config=path, metrics=metrics, losses=losses, kept=kept, steps=steps)),
            flush=True,
        )


if __name__ == "__main__":
    main()
