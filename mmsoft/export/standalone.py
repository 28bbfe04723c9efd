"""Run a ``torch.export`` program where MMSOFT is not imported.

python standalone.py PROGRAM.pt2 CASES.pt OUTPUTS.pt
"""

import sys
from pathlib import Path

import torch


def main(program: str, cases: str, outputs: str) -> None:
    """Load, run, save."""
    module = torch.export.load(program).module()
    with torch.no_grad():
        found = [list(module(images)) for images in torch.load(cases)]
    assert "mmsoft" not in sys.modules
    torch.save(found, outputs)


if __name__ == "__main__":
    # Beside this file there are modules of ours, one of them called onnx.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
    main(*sys.argv[1:])
