#!/usr/bin/env python
"""Draw which landmark explains which region, and the spectrum of their Gram matrix.

    python tools/analysis_tools/visualize_landmarks.py CONFIG IMAGE CHECKPOINT --stage 1

Writes the regions, each token with the landmark of largest `K1`; and, where the landmarks' Gram
matrix `A` is inverted, its eigenvalues with the spectral filter of the inverse.
"""

import argparse
import sys
from pathlib import Path

import torch

from mmsoft.analysis import (
    capture_image,
    inverse_filter,
    landmark_regions,
    load_model,
    spectrum,
)
from mmsoft.builder import config_parser, read_config, tool_main
from mmsoft.ops import landmark_centres
from mmsoft.visualization import draw_landmarks, draw_spectrum, save_figure

SMALLEST = 1e-6  # smallest eigenvalue drawn, relative to the largest


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = config_parser(__doc__)
    parser.add_argument("image", help="image file")
    parser.add_argument("checkpoint", nargs="?", help="default: the config's own initialization")
    parser.add_argument("--stage", type=int, default=0, help="0 to 2, as in out_indices")
    parser.add_argument("--block", type=int, default=-1, help="from 0; -1 for the last (default)")
    parser.add_argument("--head", type=int, default=0, help="head whose regions are drawn")
    parser.add_argument("--out", default="landmarks.png", help="default: landmarks.png")
    parser.add_argument("--spectrum-out", default="spectrum.png", help="default: spectrum.png")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def draw(args: argparse.Namespace) -> list[Path]:
    """Run the model and write both pictures."""
    config = read_config(args)
    model = load_model(config, args.checkpoint, args.device)
    image, block, state = capture_image(config, model, args.image, args.stage, args.block)
    layer = state.layer
    if not 0 <= args.head < layer.num_heads:
        raise ValueError(
            f"stage {block[0]} has {layer.num_heads} head(s), from 0; got head {args.head}"
        )
    where = f"stage {block[0]}, block {block[1]}"
    head, landmarks = f"{where}, head {args.head}", state.landmarks
    centres = landmark_centres(*state.hw_shape, layer.landmark_stride, layer.max_landmarks)
    if state.present is not None and state.index is not None:  # each head has its own
        chosen = state.present[0, args.head]
        centres = landmark_centres(*state.hw_shape, layer.landmark_stride)
        centres = centres[state.index[0, args.head][chosen].cpu()]
        state.q = state.q[:, [args.head]]
        landmarks = landmarks[:, [args.head]][:, :, chosen]
        args.head = 0
    regions, strength = landmark_regions(state.q, landmarks)
    regions, strength = (
        t[0, args.head].unflatten(0, state.hw_shape).cpu().numpy() for t in (regions, strength)
    )
    figure = draw_landmarks(
        image.picture,
        regions,
        strength,
        centres.numpy(),
        image.extent(state.hw_shape),
        title=head,
    )
    regions_path = save_figure(figure, args.out)
    if layer.by_content:  # without an inverse
        return [regions_path]

    eigenvalues = spectrum(landmarks)[0].cpu()
    largest = float(eigenvalues.max())
    x = torch.logspace(0, 1, 400, base=SMALLEST, dtype=torch.float64).flip(0) * largest * 1.05
    filters = inverse_filter(landmarks, x, **state.options)[0].cpu()
    solver = "direct solve" if layer.solver == "direct" else f"{layer.newton_steps} Newton steps"
    figure = draw_spectrum(
        eigenvalues.numpy(),
        x.numpy(),
        filters.numpy(),
        title=f"{where}: A of {landmarks.shape[2]} landmarks, {solver}",
    )
    return [regions_path, save_figure(figure, args.spectrum_out)]


@tool_main
def main() -> None:
    """Run the command line."""
    print(*draw(parse_args()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
