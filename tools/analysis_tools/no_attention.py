"""SOFT++ without its attention term, to measure how much of a result is due to it.

Of `attention term + depthwise convolution of the values`, stages 1 to 3 keep the convolution
alone; stage 4, whose attention is the ordinary softmax one, stays as it is. Configs reach this
class through `custom_imports` (see the `no-attention` configs under configs/demo).
"""

from typing import Any

import torch
from torch import Tensor

from mmsoft.models import SOFTPlusPlus
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.registry import MODELS


class ValueConvolution(SoftmaxFreeAttention):
    """Softmax-free attention whose attention term is zero."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # They have no effect, and DDP expects a gradient of every trainable parameter.
        for part in (self.query, self.landmark_conv, self.landmark_norm):
            if part is not None:  # averaged landmarks have no convolution
                part.requires_grad_(False)

    def attend(self, q: Tensor, v: Tensor, *where: Any) -> Tensor:
        """Zeros ``[B, H*W, C]``."""
        return torch.zeros_like(v)


@MODELS.register_module()
class SOFTPlusPlusNoAttention(SOFTPlusPlus):
    """SOFT++ whose softmax-free attention term is zero; same arguments."""

    def build_attention(self, **options: Any) -> ValueConvolution:
        """Build the attention of one block."""
        return ValueConvolution(**options)
