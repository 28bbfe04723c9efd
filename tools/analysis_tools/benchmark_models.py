"""What `benchmark.py` measures: backbones, attention layers alone, whole detectors and segmentors.

Peers come from their own libraries' configs, with random weights. The released algorithm is written
here, as an attention term that takes the place of ours in the same backbone.
"""

import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import Tensor, nn

from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or the package's .mim folder
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "train")
INSTALL = {  # what a user installs for a package that is missing
    "mmdet": "pip install 'mmsoft[det]'",
    "mmseg": "pip install 'mmsoft[seg]'",
    "mmpretrain": "pip install 'mmsoft[cls]'",
}
INSTALL_PEERS = "pip install 'mmsoft[peers]'"


class NotAvailableError(Exception):
    """A package is missing; the message is one line that says how to install it."""


def require(package: str) -> None:
    """Raise `NotAvailableError` if `package` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        raise NotAvailableError(f"{package} is missing: {INSTALL.get(package, INSTALL_PEERS)}")


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    section: str  # a key of SECTIONS
    name: str  # a key of that section's table
    size: tuple[int, int]  # of the image in pixels; for a layer, of its grid of tokens
    batch: int = 1
    mode: str = "forward"  # or "train", forward and backward
    device: str = "cpu"
    dtype: str = "float32"  # or "bfloat16", by autocast
    compiled: bool = False

    def small(self) -> "Case":
        """The same at a small size, to load libraries and start threads."""
        return replace(self, size=(64, 64) if self.section != "operator" else (8, 8), batch=1)


# ---------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------


def load_config(name: str) -> Config:
    """`package::path` of a library, or a path in our configs."""
    package = name.rpartition("::")[0]
    require(package or "mmdet")  # ours inherit from mmdet's and mmseg's
    return get_config(name) if package else Config.fromfile(ROOT / "configs" / name)


def build(config: dict, scope: str) -> nn.Module:
    """Build a model of a library without loading weights."""
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope):
        return revert_sync_batchnorm(MODELS.build(config))


def backbone(config: str, **changes: Any) -> nn.Module:
    """The backbone of a config, with `changes`."""
    loaded = load_config(config)
    return build({**loaded.model.backbone, "init_cfg": None, **changes}, loaded.default_scope)


def released_tiny() -> nn.Module:
    """SOFT++ Tiny with the same weights and the attention term of the authors' release."""
    model = backbone(OURS["tiny"], max_landmarks=None)
    use_released_attention(model)
    return model


OURS = {
    arch: f"retinanet/retinanet_softpp-{arch[0]}_fpn_1x_coco.py"
    for arch in ("tiny", "small", "medium", "large")
}


@dataclass(frozen=True)
class Backbone:
    """How to build a backbone, and which of ours is of its size."""

    label: str
    ours: str
    make: Callable[[], nn.Module]


BACKBONES = {
    **{
        f"softpp-{arch}": Backbone(
            f"SOFT++ {arch.capitalize()}", f"softpp-{arch}", lambda config=config: backbone(config)
        )
        for arch, config in OURS.items()
    },
    "softpp-tiny-newton": Backbone(
        "SOFT++ Tiny, Newton", "softpp-tiny", lambda: backbone(OURS["tiny"], solver="newton")
    ),
    "released-tiny": Backbone("SOFT++ Tiny, released algorithm", "softpp-tiny", released_tiny),
    "pvt-tiny": Backbone(
        "PVT-Tiny", "softpp-tiny", lambda: backbone("mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py")
    ),
    "pvtv2-b1": Backbone(
        "PVTv2-B1", "softpp-tiny", lambda: backbone("mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py")
    ),
    "pvtv2-b2": Backbone(
        "PVTv2-B2", "softpp-small", lambda: backbone("mmdet::pvt/retinanet_pvtv2-b2_fpn_1x_coco.py")
    ),
    "swin-tiny": Backbone(
        "Swin-T",
        "softpp-small",
        lambda: backbone("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    ),
    "convnext-tiny": Backbone(
        "ConvNeXt-T",
        "softpp-small",
        lambda: backbone(
            "mmpretrain::convnext/convnext-tiny_32xb128_in1k.py",
            out_indices=(0, 1, 2, 3),
            gap_before_final_norm=False,
        ),
    ),
    "resnet-50": Backbone(
        "ResNet-50",
        "softpp-small",
        lambda: backbone("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"),
    ),
}


# ---------------------------------------------------------------------------------------------
# The released algorithm
# ---------------------------------------------------------------------------------------------


def _materialised_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`exp(-|x_i - y_j|^2 / 2)`, `[B, heads, n, d], [B, heads, m, d] -> [B, heads, n, m]`."""
    squared = x.square().sum(-1, keepdim=True) + y.square().sum(-1)[..., None, :]
    return torch.exp(-0.5 * (squared - 2 * x @ y.mT))


def _guarded_newton(a: Tensor, steps: int) -> Tensor:
    """The released inverse: one step size for the whole batch, halved while the start diverges."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    alpha = 2 / a.sum(-1).max() ** 2
    v, halvings = alpha * a, 0
    while halvings < 10 and (eye - a @ v).abs().sum(-2).max() > 1.01:
        alpha, halvings = alpha / 2, halvings + 1
        v = alpha * a
    for _ in range(steps):
        v = 2 * v - v @ a @ v
    return v


def released_attend(
    layer: SoftmaxFreeAttention, q: Tensor, v: Tensor, hw_shape: tuple[int, int]
) -> Tensor:
    """The attention term as released: same arguments and result as `layer.attend`.

    Landmarks at the fixed stride, by a convolution over the folded heads; both kernel matrices in
    memory; the inverse multiplied from the left before the values are looked at; SOFT++.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, v = (
            t.float().unflatten(2, (layer.num_heads, -1)).transpose(1, 2).contiguous()
            for t in (q, v)
        )
        image = q.flatten(0, 1).unflatten(1, hw_shape).permute(0, 3, 1, 2)
        conv = layer.landmark_conv
        landmarks = F.conv2d(image, conv.weight, stride=conv.stride).flatten(2).mT
        landmarks = F.gelu(layer.landmark_norm(landmarks)).unflatten(0, q.shape[:2])
        kernel = _materialised_kernel(q, landmarks)
        a = _materialised_kernel(landmarks, landmarks)
        scale = a.sum(-1, keepdim=True).rsqrt()
        inverse = scale * _guarded_newton(a, layer.newton_steps) * scale.mT
        out = (kernel @ inverse) @ (kernel.mT @ v)
    return out.transpose(1, 2).flatten(2)


def use_released_attention(model: nn.Module) -> None:
    """Replace the attention term of every softmax-free layer of a SOFT++ backbone."""
    for layer in model.modules():
        if isinstance(layer, SoftmaxFreeAttention):
            layer.attend = lambda *args, layer=layer: released_attend(layer, *args)


# ---------------------------------------------------------------------------------------------
# Attention layers alone
# ---------------------------------------------------------------------------------------------

DIMS, HEADS = 64, 2  # of stage 1


class OnSquareGrid(nn.Module):
    """Our layer, for tokens `[B, N, C]` of a square grid."""

    def __init__(self, layer: SoftmaxFreeAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        side = math.isqrt(x.shape[1])
        return self.layer(x, (side, side))


def _softpp(tokens: int) -> nn.Module:
    # Stage 1 of the dense models.
    options: dict = dict(normalize=True, max_landmarks=49, solver="direct")
    return OnSquareGrid(SoftmaxFreeAttention(DIMS, HEADS, 8, 9, **options))


def _linformer(tokens: int) -> nn.Module:
    require("linformer")
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(DIMS, seq_len=tokens, heads=HEADS)


def _performer(tokens: int) -> nn.Module:
    require("performer_pytorch")
    from performer_pytorch import SelfAttention

    return SelfAttention(DIMS, heads=HEADS, dim_head=DIMS // HEADS)


def _nystromformer(tokens: int) -> nn.Module:
    require("nystrom_attention")
    from nystrom_attention import NystromAttention

    return NystromAttention(DIMS, dim_head=DIMS // HEADS, heads=HEADS)


# Projections included, each with the package's own defaults: projections to 256 (Linformer), 110
# random features (Performer), 256 landmarks (Nystromformer), 49 (ours).
OPERATORS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "softpp": ("SOFT++", _softpp),
    "softmax": ("full softmax", lambda tokens: OnSquareGrid(SoftmaxAttention(DIMS, HEADS))),
    "linformer": ("Linformer", _linformer),
    "performer": ("Performer", _performer),
    "nystromformer": ("Nyströmformer", _nystromformer),
}


# ---------------------------------------------------------------------------------------------
# Whole detectors and segmentors
# ---------------------------------------------------------------------------------------------


def _retinanet(config: str) -> nn.Module:
    loaded = load_config(config)
    loaded.model.backbone.init_cfg = None
    return build(loaded.model, "mmdet")


def _upernet(config: str, **changes: Any) -> nn.Module:
    require("mmseg")
    loaded = load_config(config)
    loaded.model.backbone = {**loaded.model.backbone, "init_cfg": None, **changes}
    loaded.model.auxiliary_head = None  # for training only
    return build(loaded.model, "mmseg")


def _upernet_pvtv2_b1() -> nn.Module:
    """MMSegmentation has no PVTv2: MMDetection's, under the head of our config (same channels)."""
    peer = load_config("mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py").model.backbone
    loaded = load_config("upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py")
    loaded.model.backbone = {**peer, "type": f"mmdet.{peer['type']}", "init_cfg": None}
    loaded.model.auxiliary_head = None
    require("mmseg")
    return build(loaded.model, "mmseg")


@dataclass(frozen=True)
class Whole:
    """A detector or segmentor: its backbone's name, and how to build it."""

    task: str  # "RetinaNet" or "UperNet"
    backbone: str
    make: Callable[[], nn.Module]


WHOLE = {
    "retinanet_softpp-tiny": Whole("RetinaNet", "softpp-tiny", lambda: _retinanet(OURS["tiny"])),
    "retinanet_softpp-small": Whole("RetinaNet", "softpp-small", lambda: _retinanet(OURS["small"])),
    "retinanet_pvtv2-b1": Whole(
        "RetinaNet", "pvtv2-b1", lambda: _retinanet("mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py")
    ),
    "retinanet_swin-tiny": Whole(
        "RetinaNet",
        "swin-tiny",
        lambda: _retinanet("mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"),
    ),
    "upernet_softpp-tiny": Whole(
        "UperNet",
        "softpp-tiny",
        lambda: _upernet("upernet/upernet_softpp-t_8xb2-160k_ade20k-512x512.py"),
    ),
    "upernet_softpp-small": Whole(
        "UperNet",
        "softpp-small",
        lambda: _upernet("upernet/upernet_softpp-s_8xb2-160k_ade20k-512x512.py"),
    ),
    "upernet_pvtv2-b1": Whole("UperNet", "pvtv2-b1", _upernet_pvtv2_b1),
    "upernet_swin-tiny": Whole(
        "UperNet",
        "swin-tiny",
        lambda: _upernet(
            "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
        ),
    ),
}


def _samples(task: str, size: tuple[int, int], batch: int) -> list:
    if task == "RetinaNet":
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    return [Sample(metainfo=meta) for _ in range(batch)]


@torch.no_grad()
def _usual_candidates(model: nn.Module, data: dict) -> None:
    """Shift RetinaNet's class scores so that `nms_pre` of them pass the threshold on these images.

    With random weights none or nearly all would pass, and non-maximum suppression would have
    nothing, or far more than usual, to do.
    """
    inputs = model.data_preprocessor(data, False)["inputs"]
    logits = torch.cat([x.flatten() for x in model(inputs, mode="tensor")[0]])
    count = min(model.test_cfg.nms_pre * len(inputs), logits.numel())
    kept = logits.topk(count).values[-1]
    threshold = model.test_cfg.score_thr
    model.bbox_head.retina_cls.bias += math.log(threshold / (1 - threshold)) - kept


# ---------------------------------------------------------------------------------------------
# One step of anything
# ---------------------------------------------------------------------------------------------

SECTIONS = {"backbone": BACKBONES, "operator": OPERATORS, "whole": WHOLE}


def build_model(case: Case) -> nn.Module:
    """Build a case's model on its device, compiled if asked, with the same weights every time.

    Raises:
        NotAvailableError: a package is missing.
    """
    torch.manual_seed(0)
    if case.section == "backbone":
        model = BACKBONES[case.name].make()
    elif case.section == "operator":
        model = OPERATORS[case.name][1](case.size[0] * case.size[1])
    else:
        model = WHOLE[case.name].make()
    model = model.to(case.device)
    if case.compiled:
        model.compile(dynamic=False)  # in place
    return model


def make_step(model: nn.Module, case: Case) -> Callable[[], Any]:
    """A function that runs `model` once on fixed random data of the case's size."""
    generator = torch.Generator().manual_seed(0)
    model.train(case.mode == "train")

    def autocast() -> Any:
        if case.dtype == "float32":
            return nullcontext()
        return torch.autocast(case.device, dtype=DTYPES[case.dtype])

    if case.section == "whole":
        shape = (3, *case.size)
        images = [torch.randint(256, shape, generator=generator).byte() for _ in range(case.batch)]
        task = WHOLE[case.name].task
        data = dict(inputs=images, data_samples=_samples(task, case.size, case.batch))
        if task == "RetinaNet":
            _usual_candidates(model, data)

        def predict() -> Any:
            with torch.no_grad(), autocast():
                return model.test_step(data)

        return predict

    if case.section == "operator":
        shape = (case.batch, case.size[0] * case.size[1], DIMS)
    else:
        shape = (case.batch, 3, *case.size)
    x = torch.randn(shape, generator=generator).to(case.device)

    def forward() -> Any:
        with torch.no_grad(), autocast():
            return model(x)

    def train() -> None:
        with autocast():
            outs = model(x)
        outs = outs if isinstance(outs, (tuple, list)) else [outs]
        outs = [out for out in outs if out.requires_grad]  # ResNet's config freezes stage 1
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        model.zero_grad(set_to_none=True)

    return train if case.mode == "train" else forward
