#!/usr/bin/env python
"""Export a classifier, segmentor or detector to ONNX or torch.export, and compare the results.

    python tools/deployment/export_onnx.py CONFIG CHECKPOINT --out model.onnx --dynamic size

The program takes images as the config's data preprocessor hands them over, normalized, and returns
a classifier's logits, a segmentor's logits at the size of the image, what a detector's dense head
says of every anchor, with `--postprocess` the boxes, scores and labels that it finds, or with
`--part backbone` the features. onnxruntime, or for `--format pt2` a
process without MMSOFT, runs it on images of several sizes; the file is written only if every output
agrees with the model's.
"""

import argparse
import sys
import time

from mmengine.logging import MMLogger
from tabulate import tabulate

from mmsoft.analysis import load_model
from mmsoft.builder import add_shape, config_parser, read_config, tool_main
from mmsoft.export import Input, export_onnx, export_program, exportable
from mmsoft.export.modules import PARTS
from mmsoft.export.program import TOLERANCE

FORMATS = dict(onnx=export_onnx, pt2=export_program)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: the config's own initialization")
    add_shape(parser)
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument(
        "--dynamic",
        nargs="+",
        choices=("batch", "size"),
        default=[],
        help="take any number of images, any height and width",
    )
    parser.add_argument("--part", choices=PARTS, default="model", help="default: model")
    parser.add_argument(
        "--postprocess",
        action="store_true",
        help="detections of a detector with one stage, after non-maximum suppression",
    )
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--out", required=True, help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"largest difference, relative to the largest output (default: {TOLERANCE:g})",
    )
    args = parser.parse_args()
    if not args.out.endswith(f".{args.format}"):
        parser.error(f"--out must end in .{args.format}, got {args.out}")
    if args.postprocess and args.part != "model":
        parser.error(f"--postprocess takes the whole model, not --part {args.part}")
    return args


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@tool_main
def main() -> None:
    """Run the command line."""
    args = parse_args()
    start = time.perf_counter()
    MMLogger.get_instance("export_onnx").setLevel("ERROR")  # each parameter, when initialized
    inputs = Input(args.shape, args.batch, "batch" in args.dynamic, "size" in args.dynamic)
    model = load_model(read_config(args), args.checkpoint)
    module = exportable(model, args.part, args.postprocess)
    differences = FORMATS[args.format](module, inputs, args.out, tolerance=args.tolerance)
    rows = [
        [
            _size(d.images),
            "yes" if d.padded else "no",
            d.name,
            _size(d.shape),
            f"{d.error:.1e}",
            d.note,
        ]
        for d in differences
    ]
    columns = ["images", "padded", "output", "shape", "error", "compared"]
    if not args.postprocess:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print(tabulate(rows, columns, "github", disable_numparse=True))
    if args.postprocess and not any(d.found for d in differences):
        print(
            "the model finds nothing in these random images, at any score_thr: no box was compared"
        )
    print(f"{args.out}, in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
