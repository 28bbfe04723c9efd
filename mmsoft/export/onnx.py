"""ONNX files, compared with the model by onnxruntime before they get their name."""

import os
import warnings
from typing import Any

import torch

from mmsoft.builder import require
from mmsoft.fileio import write_whole

from .program import (
    TOLERANCE,
    Difference,
    Input,
    differences_of,
    one_error,
    record,
    refuse,
    sizes_of,
)

OPSET = 18


def export_onnx(
    module: Any, inputs: Input, path: str | os.PathLike, *, tolerance: float = TOLERANCE
) -> list[Difference]:
    """Write an ONNX file of opset 18, which holds its weights.

    The choice of landmarks is a loop in it, one for each layer.

    Args:
        module: from :func:`exportable`, on the CPU.
        inputs: the images.
        path: of the file, ``.onnx``; written whole, or not at all.
        tolerance: how far an output may be from the module's, relative to its largest value.

    Returns:
        How far they are in onnxruntime, for each output and several sizes.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing, or torch is older than 2.6.
        ValueError: the file's outputs differ by more, or the module cannot be exported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    from onnx_ir.passes.common import (
        CommonSubexpressionEliminationPass,
        DeduplicateInitializersPass,
    )

    from .functions import translations

    program = record(module, inputs, linear_algebra=False)
    with warnings.catch_warnings(), one_error(module):
        warnings.simplefilter("ignore")  # of onnxscript and torch, about each other
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(module.names),
            opset_version=OPSET,
            custom_translation_table=translations(),
            external_data=False,
        )
    assert converted is not None
    # The exporter leaves equal constants apart, and with them the kernel's two products.
    DeduplicateInitializersPass(size_limit=1 << 20)(converted.model)
    CommonSubexpressionEliminationPass()(converted.model)
    _keep_normalizations_apart(converted.model.graph)
    with write_whole(path) as partial:
        converted.save(partial, external_data=False)
        differences = []
        with one_error(module):
            session = start(partial)
        for images in inputs.checked(sizes_of(module)):
            with one_error(module):
                found = session.run(None, {"images": images.numpy()})
            differences += differences_of(module, images, found, tolerance)
        refuse(differences, tolerance)
    return differences


def _keep_normalizations_apart(graph: Any) -> None:
    """Write the sum before a normalization as ``Sum``.

    onnxruntime fuses ``Add`` with it, into a kernel that takes five times as long as the two.
    """
    for node in graph:
        if node.op_type == "LayerNormalization":
            before = node.inputs[0].producer()
            if before is not None and before.op_type == "Add":
                before.op_type = "Sum"


def start(path: str | os.PathLike) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it warns of every constant that it folds
    # Its threads would keep the cores busy after a run, and slow torch down beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
