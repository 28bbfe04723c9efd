#!/usr/bin/env python
"""Convert a checkpoint released by the authors of SOFT and SOFT++ to the OpenMMLab format.

`init_cfg=dict(type='Pretrained', checkpoint=...)` of our backbones takes the released file as it
is. Convert it to share or inspect it, or for programs that do not import mmsoft.
"""

import argparse
from pathlib import Path

import torch

from mmsoft.checkpoint import convert_released, is_released, read_checkpoint
from mmsoft.fileio import write_whole


def convert(source: Path, target: Path, task: str = "classifier") -> dict:
    """Write the converted ``source`` to ``target``, whole or not at all, and give it.

    Raises:
        ValueError: ``source`` is refused, or is not a released checkpoint.
    """
    content = read_checkpoint(source)
    if not is_released(content):
        raise ValueError(f"{source} is not in the format of the authors' release")
    checkpoint = convert_released(content)
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
