"""SOFT++ with its attention term removed, to see how much of a result is due to it.

Of `attention term + depthwise convolution of the values`, stages 1 to 3 keep the convolution
alone; stage 4, whose attention is the ordinary softmax one, stays as it is. Configs reach this
class through `custom_imports` (see the `no-attention` configs under configs/demo).
"""

import torch
from torch import Tensor

from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.backbones.soft import SOFTPlusPlus
from mmsoft.registry import MODELS


def attend_nothing(q: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """Stand in for `SoftmaxFreeAttention.attend`: an attention term of zero."""
    return torch.zeros_like(v)


@MODELS.register_module()
class SOFTPlusPlusNoAttention(SOFTPlusPlus):
    """SOFT++ whose softmax-free attention term is zero; same arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, SoftmaxFreeAttention):
                module.attend = attend_nothing
                # Without effect, and DDP wants a gradient for all that could have one.
                for part in (module.query, module.landmark_conv, module.landmark_norm):
                    part.requires_grad_(False)
