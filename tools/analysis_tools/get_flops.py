#!/usr/bin/env python
"""Count parameters and multiply-adds of any detector, segmentor or classifier config.

`mim run mmdet get_flops` and `mim run mmpretrain get_flops` count the same (the former over images
of the data set, the latter the backbone and neck alone); mmseg's own script fails. Operators that
only move data or work elementwise are not counted, as there.
"""

import torch
from mmengine.analysis import parameter_count
from mmengine.logging import MMLogger
from tabulate import tabulate

from mmsoft import flops
from mmsoft.builder import add_shape, config_parser, read_config


def main() -> None:
    """Run the command line."""
    parser = config_parser(__doc__)
    add_shape(parser)
    args = parser.parse_args()
    MMLogger.get_instance("get_flops").setLevel("ERROR")  # what the libraries log when building
    model = flops.tensor_model(read_config(args), args.shape)
    analysis = flops.analyse(model, torch.rand(1, 3, *args.shape))
    parameters = parameter_count(model)
    rows: list[list] = [
        [name or "model", analysis.total(name) / 1e9, parameters[name] / 1e6]
        for name in ("", *dict(model.named_children()))
    ]
    rows += [[name, macs / 1e9] for name, macs in analysis.by_operator().most_common()]
    header = ["at {}x{}".format(*args.shape), "GMACs", "params (M)"]
    print(tabulate(rows, header, "plain", floatfmt=("", ".3f", ".2f")))


if __name__ == "__main__":
    main()
