"""What is measured: backbones, attention layers alone, whole detectors and segmentors.

Peers come from their own libraries' configs, with random weights.
"""

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine import load
from mmengine.config import Config
from mmengine.hub import get_config
from torch import Tensor, nn

import mmsoft
from mmsoft import builder
from mmsoft.benchmark import released  # noqa: F401  (registers its backbone)
from mmsoft.models import SequenceSOFTPlusPlus
from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from mmsoft.models.peers import build_peer
from mmsoft.ops import use_backend

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "train")
RUNTIMES = ("torch", "onnxruntime")
TOP1 = "Top 1 Accuracy (published by the authors)"  # in our metafiles


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    section: str  # "backbone", "onnx", "operator", "sequence" or "whole"
    name: str  # a key of that section's table
    size: tuple[int, int]  # of the image in pixels; of a layer's grid of tokens; (1, tokens)
    batch: int = 1
    mode: str = "forward"  # or "train", forward and backward
    device: str = "cpu"
    dtype: str = "float32"  # or "bfloat16", by autocast
    compiled: bool = False
    runtime: str = "torch"

    def small(self) -> "Case":
        """The same at a small size, to load libraries and start threads."""
        sizes = dict(operator=(8, 8), sequence=(1, 64))
        return replace(self, size=sizes.get(self.section, (64, 64)), batch=1)


# ---------------------------------------------------------------------------------------- backbones

OURS = {
    arch: f"mmsoft::retinanet/retinanet_softpp-{arch[0]}_fpn_1x_coco.py"
    for arch in ("tiny", "small", "medium", "large")
}
PVTV2_B1 = "mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py"
CONVNEXT: dict[str, Any] = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


@dataclass(frozen=True)
class Backbone:
    """A backbone: that of a config, with changes."""

    label: str
    ours: str  # which of ours is of its size
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    top1: float | None = None  # as published, see `published`
    channels_last: bool = False
    backend: str = ""  # what operations run as or raise, for `use_backend`; else they choose


CHANNELS_LAST = "-channels-last"  # ends the names of peers in that memory format
BACKBONES = {
    **{
        f"softpp-{arch}": Backbone(f"SOFT++ {arch.capitalize()}", f"softpp-{arch}", config)
        for arch, config in OURS.items()
    },
    "softpp-tiny-newton": Backbone(
        "SOFT++ Tiny, Newton", "softpp-tiny", OURS["tiny"],
        dict(landmarks="released", solver="newton"),
    ),
    # The same weights, with the attention term of the authors' release.
    "released-tiny": Backbone(
        "SOFT++ Tiny, released algorithm", "softpp-tiny", OURS["tiny"],
        dict(
            type="mmsoft.ReleasedSOFTPlusPlus", landmarks="released",
            max_landmarks=None, max_keys=None,
        ),
    ),
    # Accuracies: arXiv 2102.12122 (PVT), 2106.13797 (PVTv2), 2103.14030 (Swin), 2201.03545
    # (ConvNeXt), 2202.09741 (VAN), 2204.03645 (DaViT); MMPretrain's model zoo (ResNet).
    "pvt-tiny": Backbone(
        "PVT-Tiny", "softpp-tiny", "mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py", top1=75.1
    ),
    "pvtv2-b1": Backbone("PVTv2-B1", "softpp-tiny", PVTV2_B1, top1=78.7),
    "pvtv2-b2": Backbone(
        "PVTv2-B2", "softpp-small", "mmdet::pvt/retinanet_pvtv2-b2_fpn_1x_coco.py", top1=82.0
    ),
    "swin-tiny": Backbone(
        "Swin-T", "softpp-small", "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", top1=81.3
    ),
    "convnext-tiny": Backbone(
        "ConvNeXt-T", "softpp-small", "mmpretrain::convnext/convnext-tiny_32xb128_in1k.py",
        CONVNEXT, top1=82.1,
    ),
    "resnet-50": Backbone(
        "ResNet-50", "softpp-small", "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", top1=76.55
    ),
    # Newer ones that are linear in the tokens as well, and have features at four strides.
    "van-b1": Backbone(
        "VAN-B1", "softpp-tiny", "mmpretrain::van/van-small_8xb128_in1k.py",
        dict(out_indices=(0, 1, 2, 3)), top1=81.1,
    ),
    "davit-tiny": Backbone(
        "DaViT-T", "softpp-small", "mmpretrain::davit/davit-tiny_4xb256_in1k.py",
        dict(out_indices=(0, 1, 2, 3), pad_small_map=True), top1=82.8,
    ),
    "pvtv2-b3": Backbone(
        "PVTv2-B3", "softpp-medium", "mmdet::pvt/retinanet_pvtv2-b3_fpn_1x_coco.py", top1=83.1
    ),
    "swin-small": Backbone(
        "Swin-S", "softpp-medium",
        "mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py", top1=83.0,
    ),
    "convnext-small": Backbone(
        "ConvNeXt-S", "softpp-medium", "mmpretrain::convnext/convnext-small_32xb128_in1k.py",
        CONVNEXT, top1=83.1,
    ),
    "resnet-101": Backbone(
        "ResNet-101", "softpp-medium", "mmdet::retinanet/retinanet_r101_fpn_1x_coco.py",
        top1=77.97,
    ),
    "pvtv2-b4": Backbone(
        "PVTv2-B4", "softpp-large", "mmdet::pvt/retinanet_pvtv2-b4_fpn_1x_coco.py", top1=83.6
    ),
}  # fmt: skip
# Peers may be faster so. Ours are channels-last inside, whatever comes in.
for _name in [n for n in BACKBONES if not n.startswith(("softpp", "released"))]:
    _label = f"{BACKBONES[_name].label}, channels-last"
    BACKBONES[_name + CHANNELS_LAST] = replace(
        BACKBONES[_name], label=_label, channels_last=True, top1=None
    )
# Other settings of ours, which are measured where they matter alone.
UNBOUNDED = "-max-keys-none"
BACKBONES["softpp-tiny" + UNBOUNDED] = replace(
    BACKBONES["softpp-tiny"], label="SOFT++ Tiny, max_keys=None", changes=dict(max_keys=None)
)
# What lies between the released algorithm and ours; and by content, all that the tolerance leaves.
LANDMARKS: dict[str, tuple[str, dict[str, Any]]] = {
    f"softpp-tiny-{solver}-{budget or 'all'}": (
        f"SOFT++ Tiny, {solver.replace('newton', 'Newton')}, {budget or 'all'} landmarks",
        dict(landmarks="released", solver=solver, max_landmarks=budget),
    )
    for solver, budget in (("newton", None), *(("direct", m) for m in (None, 256, 128, 49)))
}
LANDMARKS["softpp-tiny-content-all"] = (
    "SOFT++ Tiny, by content, all that the tolerance leaves", dict(max_landmarks=None),
)  # fmt: skip
for _name, (_label, _changes) in LANDMARKS.items():
    BACKBONES[_name] = replace(BACKBONES["softpp-tiny"], label=_label, changes=_changes)
TRITON = "-triton"  # ends the names of ours with kernels, on a GPU
for _name in ("softpp-tiny", "softpp-small", "softpp-tiny-direct-49"):
    BACKBONES[_name + TRITON] = replace(
        BACKBONES[_name], label=f"{BACKBONES[_name].label}, Triton", backend="triton"
    )


def published() -> dict[str, float]:
    """Top-1 on ImageNet-1k at 224x224 without other data (%), by backbone, as its authors state it.

    Those of SOFT and SOFT++ are read from our metafile.
    """
    metafile = Path(mmsoft.__file__).parent / ".mim" / "configs" / "soft" / "metafile.yml"
    ours = {
        model["Name"].partition("_")[0]: result["Metrics"][TOP1]
        for model in load(metafile)["Models"]
        for result in model.get("Results", [])
        if TOP1 in result["Metrics"]
    }
    return ours | {name: peer.top1 for name, peer in BACKBONES.items() if peer.top1}


def load_config(name: str, **changes: Any) -> Config:
    """The config ``package::path``, its backbone with changes and without pretrained weights."""
    package = name.partition("::")[0]
    if package == "mmsoft":  # ours inherit from those
        package = "mmseg" if "upernet" in name else "mmdet"
    builder.require(package)
    config = get_config(name)
    config.model.backbone.update(init_cfg=None, **changes)
    return config


def _windows(plain: Any, layer: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """What the ``WindowMSA`` of Swin and DaViT gives, the matrix of a window never stored.

    torch's fused kernel has no gradient of a bias on CPUs: with gradients it is ``plain``.
    """
    if torch.is_grad_enabled():
        return plain(x, mask)
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = None
    if hasattr(layer, "relative_position_bias_table"):
        bias = layer.relative_position_bias_table[layer.relative_position_index]
        bias = bias.permute(2, 0, 1)[None].expand(len(x), -1, -1, -1)  # [windows, heads, N, N]
    if mask is not None:
        mask = mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)
        bias = mask if bias is None else bias + mask
    x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=layer.scale)
    return layer.proj(x.transpose(1, 2).flatten(2))


def fuse_attention(model: nn.Module) -> None:
    """Let softmax attention of peers run by torch's fused kernel, where that is the faster.

    torch's own layers do where nobody asks for the weights; PVT's ask, and drop them. Those of
    windows have code of their own: fused, Swin-T takes 0.94, 0.92 and 0.88 of the time of it at
    224x224, 512x512 and 800x1344.
    """
    for layer in model.modules():
        if isinstance(layer, nn.MultiheadAttention):
            layer.forward = partial(layer.forward, need_weights=False)  # type: ignore[method-assign]
        elif type(layer).__name__ in ("WindowMSA", "DaViTWindowMSA"):
            layer.forward = partial(_windows, layer.forward, layer)


def make_backbone(name: str, mode: str = "forward") -> Any:
    """Build one of ``BACKBONES``; peers without the BatchNorms that forward passes can do without.

    OpenMMLab has a function for theirs; ours has none by default, or folds its own.
    """
    backbone = BACKBONES[name]
    model = builder.build_model(load_config(backbone.config, **backbone.changes), "backbone")
    fuse_attention(model)
    if mode == "forward" and not backbone.config.startswith("mmsoft"):
        model.eval()  # returns None in some of the libraries' backbones
        fuse_conv_bn(model)
    return model.to(memory_format=torch.channels_last) if backbone.channels_last else model


class Exported(nn.Module):
    """A backbone in an ONNX file of one size, run by onnxruntime with as many threads as torch."""

    def __init__(self, name: str, size: tuple[int, int], batch: int):
        from mmsoft.export import Input, export_onnx, exportable
        from mmsoft.export.onnx import start

        super().__init__()
        model = SimpleNamespace(backbone=make_backbone(name).eval(), training=False)
        with TemporaryDirectory() as folder:
            file = Path(folder, "backbone.onnx")
            export_onnx(exportable(model, "backbone"), Input(size, batch), file)
            self.session = start(file)

    def forward(self, x: Tensor) -> list:
        """Features, as arrays."""
        return self.session.run(None, {"images": x.numpy()})


def runtime_label(runtime: str) -> str:
    """Its name and version."""
    return f"{runtime} {importlib.metadata.version(runtime)}"


# --------------------------------------------------------------------------- attention layers alone

DIMS, HEADS = 64, 2  # of stage 1
VOCABULARY = 257  # bytes and padding


class OnSquareGrid(nn.Module):
    """Our layer, for tokens ``[B, N, C]`` of a square grid."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        side = math.isqrt(x.shape[1])
        return self.layer(x, (side, side))


def _softpp(tokens: int, max_landmarks: int = 49) -> nn.Module:
    # Stage 1 of the dense models.
    options: dict = dict(normalize=True, max_landmarks=max_landmarks, landmarks="content")
    return OnSquareGrid(SoftmaxFreeAttention(DIMS, HEADS, 8, 9, **options))


class MaterialisedSoftmax(SoftmaxAttention):
    """Softmax attention that stores its matrix, as the SOFT paper compares itself with."""

    def __init__(self, tokens: int):
        gib = 2 * HEADS * tokens**2 * 4 / 2**30  # the scores and their softmax
        if gib > 16:
            raise ValueError(f"its matrices of {tokens} tokens would take {gib:.0f} GiB")
        super().__init__(DIMS, HEADS)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], *_: Any) -> Tensor:
        """Attend from all tokens of ``x [B, N, C]``."""
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.query(x), *self.key_value(x).chunk(2, -1))
        )
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))


# Projections included; 49 landmarks for ours, the defaults of their packages for peers, and each
# of the two that have landmarks with the other's number.
OPERATORS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "softpp": ("SOFT++, 49 landmarks", _softpp),
    "softpp-256": ("SOFT++, at most 256 landmarks", partial(_softpp, max_landmarks=256)),
    "softmax": ("softmax, fused", lambda tokens: OnSquareGrid(SoftmaxAttention(DIMS, HEADS))),
    "softmax-materialised": (
        "softmax, matrix stored",
        lambda tokens: OnSquareGrid(MaterialisedSoftmax(tokens)),
    ),
    "linformer": ("Linformer", lambda tokens: build_peer("linformer", DIMS, HEADS, tokens)),
    "performer": ("Performer", lambda tokens: build_peer("performer", DIMS, HEADS, tokens)),
    "nystromformer": (
        "Nyströmformer, 256 landmarks",
        lambda tokens: build_peer("nystromformer", DIMS, HEADS, tokens),
    ),
    "nystromformer-49": (
        "Nyströmformer, 49 landmarks",
        lambda tokens: build_peer("nystromformer", DIMS, HEADS, tokens, num_landmarks=49),
    ),
}


# ------------------------------------------------------------------------- small sequence models

# The model of the Long Range Arena with the attention of each, 64 landmarks for ours and
# Nystromformer; labels as above.
SEQUENCES: dict[str, tuple[str, str]] = {
    "softpp": ("SOFT++, 64 landmarks", "soft"),
    "softmax": ("softmax, fused", "softmax"),
    "gaussian": ("exact Gaussian kernel", "gaussian"),
    "linformer": ("Linformer", "linformer"),
    "performer": ("Performer", "performer"),
    "nystromformer": ("Nyströmformer, 64 landmarks", "nystromformer"),
    "none": ("no attention", "none"),
}


def make_sequence_model(name: str, tokens: int) -> nn.Module:
    """Build one of ``SEQUENCES`` for so many tokens."""
    attention = SEQUENCES[name][1]
    return SequenceSOFTPlusPlus(
        vocab_size=VOCABULARY, max_length=tokens, attention=attention, solver="direct"
    )


# ------------------------------------------------------------------- whole detectors and segmentors


@dataclass(frozen=True)
class Whole:
    """A detector or segmentor: its backbone's name, and its config."""

    task: str  # "RetinaNet", "Mask R-CNN" or "UperNet"
    backbone: str
    config: str


MASK_RCNN = "mmsoft::mask_rcnn/mask-rcnn_softpp-{}_fpn_1x_coco.py"
UPERNET = "mmsoft::upernet/upernet_softpp-{}_8xb2-160k_ade20k-512x512.py"
UPERNET_SWIN = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
DETECTORS = ("RetinaNet", "Mask R-CNN")
_WHOLE = (
    Whole("RetinaNet", "softpp-tiny", OURS["tiny"]),
    Whole("RetinaNet", "softpp-small", OURS["small"]),
    Whole("RetinaNet", "pvtv2-b1", PVTV2_B1),
    Whole("RetinaNet", "swin-tiny", "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"),
    Whole("Mask R-CNN", "softpp-tiny", MASK_RCNN.format("t")),
    Whole("Mask R-CNN", "softpp-small", MASK_RCNN.format("s")),
    Whole("Mask R-CNN", "pvtv2-b1", MASK_RCNN.format("t")),
    Whole("Mask R-CNN", "swin-tiny", "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    Whole("UperNet", "softpp-tiny", UPERNET.format("t")),
    Whole("UperNet", "softpp-small", UPERNET.format("s")),
    Whole("UperNet", "pvtv2-b1", UPERNET.format("t")),
    Whole("UperNet", "swin-tiny", UPERNET_SWIN),
)
WHOLE = {  # peers in both memory formats, ours as a user gets it
    f"{whole.task.lower().replace(' ', '-')}_{whole.backbone}": whole
    for whole in (
        *_WHOLE,
        *(
            replace(w, backbone=w.backbone + CHANNELS_LAST)
            for w in _WHOLE
            if "softpp" not in w.backbone
        ),
    )
}


def make_whole(name: str) -> Any:
    """Build one of ``WHOLE``."""
    whole = WHOLE[name]
    config = load_config(whole.config)
    if whole.task == "UperNet":
        config.model.auxiliary_head = None  # for training only
    if whole.backbone.startswith("pvtv2-b1") and whole.config != PVTV2_B1:
        # The libraries have none: MMDetection's, under the head of our config (same channels).
        peer = load_config(PVTV2_B1).model.backbone
        config.model.backbone = {**peer, "type": f"mmdet.{peer.type}"}
    model = builder.build_model(config)
    fuse_attention(model)
    last = BACKBONES[whole.backbone].channels_last
    return model.to(memory_format=torch.channels_last) if last else model


def _samples(task: str, size: tuple[int, int], batch: int) -> list:
    if task in DETECTORS:
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    return [Sample(metainfo=meta) for _ in range(batch)]


@torch.no_grad()
def _usual_candidates(model: Any, data: dict) -> None:
    """Let as many candidates pass the threshold of the scores here as with trained weights.

    With random weights none or nearly all would pass, and non-maximum suppression would have
    nothing, or far more than usual, to do. RetinaNet's class scores are shifted so that ``nms_pre``
    pass; Mask R-CNN's threshold is set so that ``max_per_img`` do, each of which has a mask.
    """
    found = model.data_preprocessor(data, False)
    inputs, outs = found["inputs"], model(**found, mode="tensor")
    if hasattr(model, "roi_head"):
        scores = outs[-1][0].softmax(-1)[:, :-1].flatten()
        options = model.roi_head.test_cfg
        options.score_thr = float(scores.topk(options.max_per_img * len(inputs) + 1).values[-1])
        return
    logits = torch.cat([x.flatten() for x in outs[0]])
    count = min(model.test_cfg.nms_pre * len(inputs), logits.numel())
    kept = logits.topk(count).values[-1]
    threshold = model.test_cfg.score_thr
    model.bbox_head.retina_cls.bias += math.log(threshold / (1 - threshold)) - kept


# ----------------------------------------------------------------------------- one step of anything


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Whether float32 means TF32 on a GPU: torch's own default differs between its operators."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def make_model(case: Case) -> Any:
    """Build a case's model on its device, compiled if asked, with the same weights every time."""
    torch.manual_seed(0)
    model: Any
    if case.runtime == "onnxruntime":
        model = Exported(case.name, case.size, case.batch)
    elif case.section in ("backbone", "onnx"):
        model = make_backbone(case.name, case.mode)
    elif case.section == "sequence":
        model = make_sequence_model(case.name, case.size[1])
    elif case.section == "operator":
        model = OPERATORS[case.name][1](case.size[0] * case.size[1])
    else:
        model = make_whole(case.name)
    model = model.to(case.device)
    if case.compiled:
        compile_or_fail()
        model.compile(dynamic=False)  # in place
    return model


def compile_or_fail() -> None:
    """Let torch compile as often as there are cases, and fail where it would give up silently.

    All modules share the code that it compiles; after eight of them it runs the others as they are.
    """
    for name, value in (("recompile_limit", 128), ("fail_on_recompile_limit_hit", True)):
        if hasattr(torch._dynamo.config, name):  # since torch 2.6
            setattr(torch._dynamo.config, name, value)


def make_step(model: Any, case: Case) -> Callable[[], Any]:
    """A function that runs ``model`` once on fixed random data of the case's size."""
    generator = torch.Generator().manual_seed(0)
    model.train(case.mode == "train")

    backend = BACKBONES[case.name].backend if case.section == "backbone" else ""

    @contextmanager
    def setting() -> Iterator[None]:  # of backward passes too
        with precision(case.dtype), use_backend(backend) if backend else nullcontext():
            yield

    def autocast() -> Any:
        return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16")

    if case.section == "whole":
        shape: tuple[int, ...] = (3, *case.size)
        images = [torch.randint(256, shape, generator=generator).byte() for _ in range(case.batch)]
        task = WHOLE[case.name].task
        data = dict(inputs=images, data_samples=_samples(task, case.size, case.batch))
        if task in DETECTORS:
            _usual_candidates(model, data)

        def predict() -> Any:
            with torch.no_grad(), setting(), autocast():
                return model.test_step(data)

        return predict

    if case.section == "operator":
        shape = (case.batch, case.size[0] * case.size[1], DIMS)
    else:
        shape = (case.batch, 3, *case.size)
    if case.section == "sequence":
        x = torch.randint(1, VOCABULARY, (case.batch, case.size[1]), generator=generator)
    else:
        x = torch.randn(shape, generator=generator)
    x = x.to(case.device)
    if case.section == "backbone" and BACKBONES[case.name].channels_last:
        x = x.to(memory_format=torch.channels_last)

    def forward() -> Any:
        with torch.no_grad(), setting(), autocast():
            return model(x)

    def train() -> None:
        with setting():
            with autocast():
                outs = model(x)
            outs = outs if isinstance(outs, (tuple, list)) else [outs]
            outs = [out for out in outs if out.requires_grad]  # ResNet's config freezes stage 1
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        model.zero_grad(set_to_none=True)

    return train if case.mode == "train" else forward
