#!/usr/bin/env python
"""Count parameters and multiply-adds of any detector, segmentor or classifier config.

`mim run mmdet get_flops` and `mim run mmpretrain get_flops` count the same (the former over images
of the data set, the latter the backbone and neck alone); mmseg's own script fails. Operators that
only move data or work elementwise are not counted, as there.
"""

import argparse
import logging
from functools import partial

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmsoft import flops


def sample_class(scope: str) -> type:
    """The library's data sample, which two-stage detectors ask for the size of the image."""
    if scope == "mmdet":
        from mmdet.structures import DetDataSample as DataSample
    elif scope == "mmseg":
        from mmseg.structures import SegDataSample as DataSample
    else:
        from mmpretrain.structures import DataSample
    return DataSample


def build(config: Config, shape: tuple[int, int]) -> nn.Module:
    """Build a config's model so that ``model(image)`` runs its ``tensor`` mode.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        shape: (height, width) of the images.
    """
    scope = config.get("default_scope", "mmdet")
    init_default_scope(scope)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    if getattr(model, "with_auxiliary_head", False):
        model.auxiliary_head = None  # for training only
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
    sample = sample_class(scope)(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
    model.forward = partial(model.forward, data_samples=[sample], mode="tensor")
    return model


def analyse(config: Config, shape: tuple[int, int]) -> tuple[nn.Module, FlopAnalyzer]:
    """Count the multiply-adds of one random image; the counts are in the analyzer.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        shape: (height, width) of the image.
    """
    # One warning for each operator that is not counted.
    MMLogger.get_instance("get_flops", log_level="ERROR").setLevel(logging.ERROR)
    flops.register()  # also for configs of other backbones, to compare with
    with torch.no_grad():
        model = build(config, shape)
        analysis = FlopAnalyzer(model, torch.rand(1, 3, *shape))
        analysis.total()  # traces, and keeps the counts
    return model, analysis


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line of a tool that runs a config's model on a random image."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file of mmdet, mmseg or mmpretrain")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=[224],
        help="height and width, or one number for both (default: 224)",
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="key=value changes")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config, tuple[int, int]]:
    """Read the command line of such a tool: arguments, config, (height, width)."""
    args = parser.parse_args()
    if len(args.shape) > 2 or min(args.shape) < 1:
        parser.error(f"--shape takes one or two positive numbers, got {args.shape}")
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    return args, config, (args.shape[0], args.shape[-1])


def main() -> None:
    """Run the command line."""
    _, config, shape = parse(make_parser(__doc__.splitlines()[0]))
    model, analysis = analyse(config, shape)
    rows = [(name, analysis.total(name)) for name in ("", *dict(model.named_children()))]
    operators = analysis.by_operator()
    parameters = parameter_count(model)
    print(f"{'':32}{'GMACs':>10}{'params (M)':>12}   at {shape[0]}x{shape[1]}")
    for name, macs in rows:
        print(f"{name or 'model':32}{macs / 1e9:10.3f}{parameters[name] / 1e6:12.2f}")
    for name, macs in operators.most_common():
        print(f"  {name:30}{macs / 1e9:10.3f}")


if __name__ == "__main__":
    main()
