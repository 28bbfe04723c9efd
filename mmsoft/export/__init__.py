"""Models as programs that run without Python or without MMSOFT: ONNX and ``torch.export``.

:func:`exportable` makes a module of tensors from a config's model, :func:`export_onnx` and
:func:`export_program` write and check it. ``tools/deployment/export_onnx.py`` is the command.
"""

from .modules import exportable
from .onnx import export_onnx
from .program import Input, export_program

__all__ = ["Input", "export_onnx", "export_program", "exportable"]
