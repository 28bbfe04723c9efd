"""Scale of the attention term at initialization, compared with the convolution of the values.

    python tools/analysis_tools/attention_scale.py --arch tiny
    python tools/analysis_tools/attention_scale.py --landmarks released --max-landmarks 256

Prints, for every softmax-free block and image size, the standard deviation of both terms and their
ratio. All sizes show the same smooth random image. Landmarks by content, SOFT++'s default, keep the
term's size at every size of the image. Of released landmarks, which are SOFT's, `--attn-init`
decides about it: with `balanced`, the default, the ratio should be of order 1 and the same at every
size, `released` is the authors' initialization; `--solver` is their inverse (default: direct).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from mmsoft.analysis import capture
from mmsoft.models import SOFT, SOFTPlusPlus

SIZES = ((224, 224), (512, 512), (800, 1344))
LARGE = (2048, 2048)


def smooth_image(size: int = 224, seed: int = 0) -> Tensor:
    """Octaves of noise `[1, 3, size, size]` with the amplitudes of natural images."""
    g = torch.Generator().manual_seed(seed)
    octaves = (
        F.interpolate(torch.randn(1, 3, n, n, generator=g), (size, size), mode="bicubic") / n**0.5
        for n in (4, 8, 16, 32, 64)
    )
    image = sum(octaves, torch.zeros(()))
    return (image - image.mean()) / image.std()


@torch.no_grad()
def attention_scale(model: SOFT, image: Tensor) -> list[tuple[float, float]]:
    """Standard deviations of the attention term and of the values' convolution, block by block."""
    scales = []
    with capture(model) as states:
        model(image)
    for state in states.values():
        v = state.v.transpose(1, 2).flatten(2)
        attended = state.attend()
        convolved = state.layer.convolve_values(v, state.hw_shape)
        scales.append((attended.std().item(), convolved.std().item()))
    return scales


def scales_by_size(
    variant: type[SOFT],
    sizes: Sequence[tuple[int, int]] = SIZES,
    train: bool = False,
    **kwargs: Any,
) -> list[list[tuple[float, float]]]:
    """`attention_scale` of a freshly initialized backbone, for every size."""
    torch.manual_seed(0)
    model = variant(**kwargs).train(train)
    image = smooth_image()
    return [attention_scale(model, F.interpolate(image, size, mode="bilinear")) for size in sizes]


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("SOFT", "SOFTPlusPlus"), default="SOFTPlusPlus")
    parser.add_argument("--arch", default="tiny")
    parser.add_argument("--solver", choices=("newton", "direct"))
    parser.add_argument("--landmarks", choices=("content", "released"))
    parser.add_argument(
        "--max-landmarks", type=lambda text: None if text == "none" else int(text), default=49
    )
    parser.add_argument("--attn-init", choices=("balanced", "released"))
    parser.add_argument("--train", action="store_true", help="batch statistics in BatchNorm")
    args = vars(parser.parse_args())
    variant = {"SOFT": SOFT, "SOFTPlusPlus": SOFTPlusPlus}[args.pop("variant")]
    for name, default in (("solver", "direct"), ("attn_init", "balanced")):
        if args[name] is None:
            args[name] = default
        elif (args["landmarks"] or ("content" if variant.normalize else "")) == "content":
            parser.error(
                f"--{name.replace('_', '-')} is of released landmarks: add --landmarks released"
            )
    sizes = (*SIZES, LARGE)
    columns = scales_by_size(variant, sizes, **args)
    print("attention / values' convolution = ratio")
    rows = [
        [block, *(f"{a:.3f} / {c:.3f} = {a / c:.2f}" for a, c in row)]
        for block, row in enumerate(zip(*columns, strict=True))
    ]
    print(tabulate(rows, ["block", *(f"{h}x{w}" for h, w in sizes)], "plain"))


if __name__ == "__main__":
    main()
