"""Let a torchvision built for CUDA import beside a CPU torch (development environment only).

The two then disagree on the binary interface: torchvision's operators do not load, and registering
their fake versions fails with "operator torchvision::nms does not exist". Nothing here calls those
operators (mmcv has its own), so declaring the two schemas is enough. The set-up program copies
this file into the site-packages of ``.venv`` beside a ``.pth`` line that imports it at every start
of the interpreter: it must stay cheap, and torch is imported only once torchvision is.
"""

import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list = []  # torch drops a library's operators with the object


class DeclareSchemas:
    """A finder that finds nothing, but acts just before torchvision registers fake operators."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Declare the operators that torchvision itself could not load."""
        if name == "torchvision._meta_registrations":
            import torch

            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    library = torch.library.Library("torchvision", "FRAGMENT")
                    library.define(operator + SCHEMA)
                    _libraries.append(library)


sys.meta_path.insert(0, DeclareSchemas)
