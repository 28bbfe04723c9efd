"""Our operators in MMEngine's complexity analysis, which the ``get_flops`` tools use.

As there, a fused multiply-add counts as one, and exponentials do not count. MMEngine by itself
would report the operators as unsupported and count nothing for them.

The published figures (1.9, 3.3, 7.2, 11.0, 16.3 G at 224x224) agree within 5 % with
everything *except* ``newton_raphson_pinv``: the authors did not count the iteration, which is 9 to
15 % of the total there and grows with the cube of the landmarks.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config
from torch import Tensor, nn

from mmsoft.builder import build_model

Handle = Callable[[list, list], Counter]


def gaussian_kernel_product_macs(x: list[int], y: list[int], w: list[int]) -> int:
    """``K w``: scalar products ``[n, d] x [d, m]``, then ``[n, m] x [m, d_w]``.

    Args:
        x: shape ``[B, heads, n, d]``.
        y: shape ``[B, heads, m, d]``.
        w: shape ``[B, heads, m, d_w]``.
    """
    return prod(x[:-1]) * y[-2] * (x[-1] + w[-1])


def newton_step_size_macs(a: list[int]) -> int:
    """A matrix ``[m, m]`` times a vector; ``a`` is ``[..., m, m]``."""
    return prod(a)


def newton_raphson_pinv_macs(a: list[int], steps: int) -> int:
    """Two products ``[m, m] x [m, m]`` a step, and two for the start; ``a`` is ``[..., m, m]``."""
    return prod(a) * a[-1] * 2 * (steps + 1)


def tikhonov_solve_macs(a: list[int], b: list[int]) -> int:
    """``A^2`` (m^3), its Cholesky factor (m^3 / 6), two triangular solves (m^2 d together)."""
    m = a[-1]
    return prod(a[:-2]) * (m**3 + m**3 // 6 + m**2 * b[-1])


def landmark_choice_macs(candidates: list[int], budget: int) -> int:
    """Of every step, a row of the Gram matrix and its product with the rows before it.

    As if the budget were used up; on a CPU the choice ends when its tolerance is reached.

    Args:
        candidates: shape ``[B, heads, M, d]``.
        budget: the largest number of landmarks.
    """
    kept = min(candidates[2], budget)
    return prod(candidates) * kept + prod(candidates[:3]) * kept * (kept - 1) // 2


def scaled_dot_product_attention_macs(q: list[int], k: list[int], v: list[int]) -> int:
    """``q k^T``, then its product with ``v``: the attention of stage 4."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _handle(name: str, macs: Callable[..., int], shapes: int, constants: tuple = ()) -> Handle:
    """Adapt ``macs`` to a node of a traced graph: shapes of the first inputs, then constants."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter:
        arguments = [get_shape(value) for value in inputs[:shapes]]
        return Counter({name: macs(*arguments, *(inputs[i].toIValue() for i in constants))})

    return handle


def _newton(inputs: list[Any], outputs: list[Any]) -> Counter:
    """The iteration, and the step size where none is given."""
    a = get_shape(inputs[0])
    macs = Counter(newton_raphson_pinv=newton_raphson_pinv_macs(a, inputs[3].toIValue()))
    if inputs[1].type().kind() == "NoneType":
        macs["newton_step_size"] = newton_step_size_macs(a)
    return macs


HANDLES: dict[str, Handle] = {
    f"mmsoft::{name}": _handle(name, macs, shapes, constants)
    for name, macs, shapes, constants in (
        ("gaussian_kernel_product", gaussian_kernel_product_macs, 3, ()),
        ("landmark_choice", landmark_choice_macs, 1, (1,)),
        ("tikhonov_solve", lambda a, mu, b: tikhonov_solve_macs(a, b), 3, ()),
    )
}
HANDLES["mmsoft::newton_raphson_pinv"] = _newton
# Of other models; ours are traced without it.
_FUSED = {
    "aten::scaled_dot_product_attention": _handle(
        "scaled_dot_product_attention", scaled_dot_product_attention_macs, 3
    )
}


def tensor_model(config: Config, shape: tuple[int, int]) -> Any:
    """Build a config's model so that ``model(image)`` runs its ``tensor`` mode.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        shape: (height, width) of the images.
    """
    model = build_model(config).eval()
    if getattr(model, "with_auxiliary_head", False):
        model.auxiliary_head = None  # for training only
    # Two-stage detectors ask the data sample for the size of the image.
    if config.default_scope == "mmdet":
        from mmdet.structures import DetDataSample as DataSample
    elif config.default_scope == "mmseg":
        from mmseg.structures import SegDataSample as DataSample
    else:
        from mmpretrain.structures import DataSample
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
    sample = DataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
    model.forward = partial(model.forward, data_samples=[sample], mode="tensor")
    return model


@torch.no_grad()
def analyse(model: nn.Module, images: Tensor) -> FlopAnalyzer:
    """Count the multiply-adds of ``model(images)``, of our backbones or others."""
    analysis = FlopAnalyzer(model, images).set_op_handle(**HANDLES, **_FUSED)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator without a counter
    try:
        analysis.tracer_warnings("none").total()  # traces, and keeps the counts
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return analysis
