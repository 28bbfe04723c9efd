#!/usr/bin/env python
"""Convert a checkpoint released by the authors of SOFT and SOFT++ to the OpenMMLab format.

`init_cfg=dict(type='Pretrained', checkpoint=...)` of our backbones takes the released file as it
is. Convert it to share or inspect it, or for programs that do not import mmsoft.
"""

import argparse
import re
from collections.abc import Collection
from pathlib import Path

import torch

from mmsoft.checkpoint import convert_released, is_released, read_checkpoint
from mmsoft.checkpoint.checks import summary
from mmsoft.fileio import write_whole
from mmsoft.models import SOFT
from mmsoft.models.backbones.arch import ARCHS, STAGES

HEAD = {"head.fc.weight", "head.fc.bias"}


def problems_of(names: Collection[str], task: str) -> list[str]:
    """Which keys of a converted file are missing, and which are too many.

    They are compared with those of a model with as many blocks.
    """
    text = "\n".join(names)
    blocks = [
        re.findall(rf"^backbone\.stages\.{i}\.blocks\.(\d+)\.", text, re.M) for i in range(STAGES)
    ]
    depths = [len(set(found)) or 1 for found in blocks]
    arch = dict(ARCHS["tiny"], depths=depths)  # widths are in no name
    with torch.device("meta"):
        backbone = SOFT(
            arch,
            out_indices=(STAGES - 1,),
            out_type="cls_token",
            landmarks="released",
            norm_cfg=dict(type="BN"),
        )
    wanted = {f"backbone.{name}" for name in backbone.state_dict()}
    missing = (wanted | (HEAD if task == "classifier" else set())) - set(names)
    unexpected = set(names) - wanted - HEAD
    return [
        f"{len(keys)} {what}: {summary(sorted(keys))}"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]


def convert(source: Path, target: Path, task: str = "classifier") -> dict:
    """Write the converted ``source`` to ``target``, whole or not at all, and give it.

    Raises:
        ValueError: ``source`` is refused, is not a released checkpoint, or lacks a part of one.
    """
    content = read_checkpoint(source)
    if not is_released(content):
        raise ValueError(f"{source} is not in the format of the authors' release")
    checkpoint = convert_released(content)
    if problems := problems_of(checkpoint["state_dict"], task):
        raise ValueError(f"{source} has not the keys of the release; {'; '.join(problems)}")
    if task == "backbone":
        for name in [name for name in checkpoint["state_dict"] if name.startswith("head.")]:
            del checkpoint["state_dict"][name]
    with write_whole(target) as partial:
        torch.save(checkpoint, partial)
    return checkpoint


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="released file, e.g. SOFT_Tiny_norm.pth")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument(
        "--task",
        choices=("classifier", "backbone"),
        default="classifier",
        help="with or without the class head (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        checkpoint = convert(args.source, args.target, args.task)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    released = checkpoint["meta"]["released"]
    print(f"variant   {released['variant'] or 'unknown: SOFT or SOFT++'}")
    for key, value in released["arch"].items():
        print(f"{key}   {value}")
    print(f"weights   {released['weights']}, epoch {released['epoch']}")
    print(f"wrote {len(checkpoint['state_dict'])} tensors to {args.target}")


if __name__ == "__main__":
    main()
