"""ONNX files, compared with the model by onnxruntime before they get their name."""

import os
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
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
THRESHOLD = "score_thr"  # name of a constant in files of detectors with their post-processing


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
    import onnx_ir as ir
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
    graph = converted.model.graph
    threshold = None
    if hasattr(module, "lower_threshold"):
        (threshold,) = (v for name, v in graph.initializers.items() if _is_threshold(name))
        # Like no other constant for now, so that it keeps its name.
        value, threshold.const_value = threshold.const_value, ir.tensor(np.float32(-54321.0))
    # The exporter leaves equal constants apart, and with them the kernel's two products.
    DeduplicateInitializersPass(size_limit=1 << 20)(converted.model)
    CommonSubexpressionEliminationPass()(converted.model)
    if threshold is not None:
        threshold.const_value, threshold.name = value, THRESHOLD
    _keep_normalizations_apart(graph)
    with write_whole(path) as partial:
        converted.save(partial, external_data=False)
        differences = []
        with one_error(module):
            session = start(partial)
        for images in inputs.checked(sizes_of(module)):
            with one_error(module):
                found = session.run(None, {"images": images.numpy()})
            differences += differences_of(module, images, found, tolerance)
        if threshold is not None and not any(d.found for d in differences):
            differences += _at_lower_threshold(module, partial, images, tolerance)
        refuse(differences, tolerance)
    return differences


def _is_threshold(name: str) -> bool:
    return name.rpartition(".")[2] == THRESHOLD


def _at_lower_threshold(
    module: Any, path: os.PathLike, images: torch.Tensor, tolerance: float
) -> list[Difference]:
    """The same of a file, but for ``score_thr``, which is so low that something is found."""
    import onnx

    value = module.lower_threshold(images)
    file = onnx.load(path)
    (tensor,) = (each for each in file.graph.initializer if each.name == THRESHOLD)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.float32), THRESHOLD))
    with one_error(module):
        found = start(file.SerializeToString()).run(None, {"images": images.numpy()})
    with module.with_threshold(value):
        differences = differences_of(module, images, found, tolerance)
    return [replace(d, note=d.note and f"{d.note} at {THRESHOLD}={value:.3g}") for d in differences]


def _keep_normalizations_apart(graph: Any) -> None:
    """Write the sum before a normalization as ``Sum``.

    onnxruntime fuses ``Add`` with it, into a kernel that takes five times as long as the two.
    """
    for node in graph:
        if node.op_type == "LayerNormalization":
            before = node.inputs[0].producer()
            if before is not None and before.op_type == "Add":
                before.op_type = "Sum"


def start(file: str | os.PathLike | bytes) -> Any:
    """An onnxruntime session of a file, or its content, on the CPU with torch's threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it warns of every constant that it folds
    # Its threads would keep the cores busy after a run, and slow torch down beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        os.fspath(file), options, providers=["CPUExecutionProvider"]
    )
