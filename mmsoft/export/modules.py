"""A module from images to tensors for each kind of model."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsoft.models import SequenceSOFT

from .detections import (
    NAMES,
    check,
    compare_detections,
    detections,
    lower_threshold,
    sizes_of_images,
)
from .program import Difference

PARTS = ("model", "backbone")


class _Part(nn.Module):
    """What all have: names of the outputs, the stride of the coarsest features, and a title."""

    names: Sequence[str] = ("logits",)
    coarsest = 32

    def __init__(self, model: Any):
        super().__init__()
        self.title = f"{type(model).__name__} with {type(model.backbone).__name__}"


class _Backbone(_Part):
    """Features, or the class token."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.backbone = model.backbone
        if not hasattr(self.backbone, "out_indices"):
            raise ValueError(
                f"{type(self.backbone).__name__} does not say by out_indices which features it "
                "returns"
            )
        if getattr(self.backbone, "out_type", "featmap") == "cls_token":
            self.names = ["cls_token"]
        else:
            self.names = [f"stage{i + 1}" for i in self.backbone.out_indices]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images))


class _Classifier(_Part):
    """Logits ``[B, classes]``."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model(images, mode="tensor"),)


class _Segmentor(_Part):
    """Logits ``[B, classes, H, W]`` of whole images."""

    @torch.no_grad()
    def __init__(self, model: Any):
        super().__init__(model)
        self.backbone = model.backbone
        self.neck = model.neck if model.with_neck else nn.Identity()
        self.decode_head = model.decode_head
        self.align_corners = model.align_corners
        found = self._logits(next(model.parameters()).new_zeros(1, 3, 64, 64))
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(self.decode_head).__name__} returns other things beside logits; export its "
                "backbone (part='backbone')"
            )

    def _logits(self, images: Tensor) -> Any:
        return self.decode_head(self.neck(self.backbone(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, size = self._logits(images), images.shape[2:]
        # The cheapest place for it: the classes are few, and what follows is the argmax.
        return (F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners),)


class _Detector(_Part):
    """What the dense head says of every anchor, level by level, before any post-processing.

    A two-stage detector's dense head is that of its proposals; its features come too, from which a
    program of its own has to pool regions.
    """

    @torch.no_grad()
    def __init__(self, model: Any):
        super().__init__(model)
        self.backbone = model.backbone
        self.neck = model.neck if model.with_neck else nn.Identity()
        self.two_stage = bool(getattr(model, "with_rpn", False))
        self.head = model.rpn_head if self.two_stage else model.bbox_head
        strides = [max(stride) for stride in self.head.prior_generator.strides]
        self.coarsest, levels = max(strides), len(strides)
        # What a head returns goes, in this order, into its loss.
        names = list(signature(self.head.loss_by_feat).parameters)
        names = names[: next(i for i, name in enumerate(names) if name.startswith("batch_"))]
        one = next(model.parameters())
        side = max(64, self.coarsest)
        found = self.head(self._features(one.new_zeros(1, 3, side, side)))
        if [_levels(outputs) for outputs in found] != [levels] * len(names):
            raise ValueError(
                f"{type(self.head).__name__} returns other outputs than {', '.join(names)} of "
                f"{levels} levels; export its backbone (part='backbone')"
            )
        names = (["features"] if self.two_stage else []) + names
        self.names = [f"{name}_{level}" for name in names for level in range(levels)]

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self._features(images)
        outputs = self.head(features)
        return (
            *(features if self.two_stage else ()),
            *(level for levels in outputs for level in levels),
        )


class _Detections(_Detector):
    """Boxes, scores and labels, after non-maximum suppression; see :func:`detections`."""

    # In torch a program of it would be as many steps as there are detections.
    onnx_alone = "its non-maximum suppression is an operator of ONNX that torch does not have"
    score_thr: Tensor

    def __init__(self, model: Any):
        super().__init__(model)
        self.names = NAMES
        self.padded = getattr(model.backbone, "ignore_padding", True)
        # A value by name in the file, which can be changed there.
        score_thr = torch.tensor(float(self.head.test_cfg.get("score_thr", 0)))
        self.register_buffer("score_thr", score_thr, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs, sizes = self.head(self._features(images)), sizes_of_images(images, self.padded)
        return detections(self.head, outputs, sizes, self.score_thr)

    @torch.no_grad()
    def lower_threshold(self, images: Tensor) -> float:
        """A ``score_thr`` at which something is found in images."""
        return lower_threshold(self.head, self.head(self._features(images)))

    @contextmanager
    def with_threshold(self, score_thr: float) -> Iterator[None]:
        """Another ``score_thr``, also of MMDetection's own post-processing."""
        before = self.score_thr, self.head.test_cfg
        self.score_thr = torch.tensor(score_thr)
        self.head.test_cfg = copy.deepcopy(before[1])
        self.head.test_cfg.score_thr = float(self.score_thr)
        try:
            yield
        finally:
            self.score_thr, self.head.test_cfg = before

    @torch.no_grad()
    def differences(self, images: Tensor, found: list[Any], tolerance: float) -> list[Difference]:
        """How far a program's outputs are from what the head's own ``predict`` says."""
        outputs, sizes = self.head(self._features(images)), sizes_of_images(images, self.padded)
        return compare_detections(self.head, images, sizes, outputs, found, tolerance)


def _levels(outputs: Any) -> int | None:
    """How many levels a head's output has, where it is a list of tensors."""
    if isinstance(outputs, list | tuple) and all(isinstance(one, Tensor) for one in outputs):
        return len(outputs)
    return None


def _needed(module: nn.Module) -> int:
    """Arguments without a default."""
    parameters = signature(module.forward).parameters.values()
    return sum(
        p.default is Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters
    )


def exportable(model: Any, part: str = "model", postprocess: bool = False) -> Any:
    """The part of a model that leaves as a program: from images ``[B, 3, H, W]`` to tensors.

    Args:
        model: a classifier, segmentor or detector in evaluation mode, from
            :func:`mmsoft.analysis.load_model`. Images are as its data preprocessor hands them over:
            normalized and padded.
        part: ``'model'`` for logits of a classifier, logits of a segmentor at the size of the
            image, or what a detector's dense head says before post-processing; ``'backbone'`` for
            its features.
        postprocess: of a detector with one stage: what its dense head's ``predict`` finds, ``dets``
            ``[B, K, 5]`` and ``labels`` ``[B, K]`` for ``K = test_cfg.max_per_img``. A row of
            ``dets`` is (x1, y1, x2, y2, score) in pixels of the image; an image with fewer has
            zeros, and labels of -1, at the end.

    Returns:
        A module that returns a tuple, and the names of what is in it as ``module.names``.

    Raises:
        ValueError: ``part`` is unknown, or the model is of no kind that can be exported, or its
            post-processing is not.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {PARTS}, got {part!r}")
    if model.training:
        raise ValueError("the model must be in evaluation mode: call model.eval()")
    if isinstance(getattr(model, "backbone", None), SequenceSOFT):
        raise ValueError(
            f"{type(model.backbone).__name__} takes sequences; only models of images are exported"
        )
    if postprocess and part != "model":
        raise ValueError(f"part={part!r} has no post-processing")
    if postprocess:
        check(model)
    if part == "backbone":
        module: _Part = _Backbone(model)
    elif hasattr(model, "decode_head"):
        if isinstance(model.decode_head, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has several decode heads; export its backbone "
                "(part='backbone')"
            )
        if (needed := _needed(model.decode_head)) != 1:
            raise ValueError(
                f"{type(model.decode_head).__name__} takes {needed} arguments, not features alone; "
                "export its backbone (part='backbone')"
            )
        module = _Segmentor(model)
    elif hasattr(getattr(model, "bbox_head", getattr(model, "rpn_head", None)), "prior_generator"):
        module = (_Detections if postprocess else _Detector)(model)
    elif hasattr(model, "head"):
        module = _Classifier(model)
    else:
        raise ValueError(
            f"{type(model).__name__} is no classifier, encoder-decoder or detector with a dense "
            "head; export its backbone (part='backbone') and the rest by yourself"
        )
    return module.eval()
