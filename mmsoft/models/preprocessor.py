"""How sequences of unlike lengths become a batch."""

from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor

from mmsoft.registry import MODELS


@MODELS.register_module()
class SequencePreprocessor(BaseDataPreprocessor):
    """Fill up with 0, which is padding, to the longest sequence of the batch.

    Args:
        batch_augments: MMPreTrain hands this over; there are none for sequences.
        non_blocking: whether copies to a device wait.
    """

    def __init__(self, batch_augments: dict | None = None, non_blocking: bool = False):
        super().__init__(non_blocking)
        if batch_augments is not None:
            raise ValueError(f"batch_augments must be None for sequences, got {batch_augments!r}")

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Make ``inputs``, a list of integers ``[..., N]``, one tensor ``[B, ..., longest]``."""
        data = self.cast_data(data)
        inputs = data["inputs"]
        longest = max(tokens.shape[-1] for tokens in inputs)
        batch = inputs[0].new_zeros(len(inputs), *inputs[0].shape[:-1], longest)
        for target, tokens in zip(batch, inputs):
            target[..., : tokens.shape[-1]] = tokens
        return {**data, "inputs": batch.to(torch.int64)}
