"""Post-processing of a dense head: boxes and their suppression in tensors of one shape.

MMDetection's own has as many candidates as are above a score. Here there are always as many as
could be, and what is not above it has the score ``ABSENT``.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsoft.models.padding import inside
from mmsoft.ops.library import custom_op, smaller

from .program import Difference

NAMES = ("dets", "labels")
ABSENT = -1.0
_NMS_KEYS = {"type", "iou_threshold", "class_agnostic", "split_thr"}
_METHODS = ("predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")


# A namespace of its own, because those of `mmsoft` choose between implementations.
@custom_op("mmsoft_export::suppress")
def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Non-maximum suppression of each image by itself, as mmcv's.

    Args:
        boxes: ``[B, N, 4]``, (x1, y1, x2, y2).
        scores: ``[B, N]``, ``ABSENT`` for what is no box.
        iou_threshold: what overlaps by more with a box of a higher score is left out.
        most: boxes of an image that are kept.

    Returns:
        Which are kept, bool ``[B, N]``.
    """
    from mmcv.ops import nms

    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(boxes)):
        (present,) = (scores[image] > ABSENT).nonzero(as_tuple=True)
        if len(present):
            _, best = nms(boxes[image, present], scores[image, present], iou_threshold)
            kept[image, present[best[:most]]] = True
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def check(model: Any) -> None:
    """Raise ValueError, with the name of what hinders, unless :func:`detections` does it."""
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.detectors import SingleStageDetector
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder

    title, instead = type(model).__name__, "; export it without post-processing"
    head = getattr(model, "bbox_head", None)
    if getattr(type(model), "predict", None) is not SingleStageDetector.predict or head is None:
        raise ValueError(
            f"post-processing is exported of detectors with one stage whose boxes are those of a "
            f"dense head, which {title} is not{instead}"
        )
    name = type(head).__name__
    if not isinstance(head, BaseDenseHead):
        raise ValueError(f"{title}'s {name} is no dense head of MMDetection{instead}")
    own = [m for m in _METHODS if getattr(type(head), m) is not getattr(BaseDenseHead, m)]
    if own:
        raise ValueError(f"{name} has a post-processing of its own, {', '.join(own)}{instead}")
    coder = getattr(head, "bbox_coder", None)
    if type(coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        raise ValueError(
            f"{name} decodes boxes with {type(coder).__name__}, not DeltaXYWHBBoxCoder or "
            f"DistancePointBBoxCoder{instead}"
        )
    if getattr(getattr(head, "loss_cls", None), "custom_cls_channels", False):
        raise ValueError(f"{name} takes its scores from {type(head.loss_cls).__name__}{instead}")
    cfg = head.test_cfg or {}
    for key in ("nms_pre", "max_per_img"):
        if (cfg.get(key) or -1) < 0:
            raise ValueError(
                f"test_cfg.{key} must be positive for post-processing, got {cfg.get(key)}; set it "
                f"by --cfg-options model.test_cfg.{key}=..."
            )
    nms = cfg.get("nms") or {}
    if nms.get("type", "nms") != "nms":
        raise ValueError(f"ONNX has no {nms['type']}, which test_cfg.nms asks for{instead}")
    if "iou_threshold" not in nms or not _NMS_KEYS.issuperset(nms):
        raise ValueError(
            f"test_cfg.nms must have iou_threshold, and beside it only type, class_agnostic and "
            f"split_thr, got {dict(nms)}{instead}"
        )


class _Candidates(NamedTuple):
    """Of one level or of all: ``[B, N]``, and ``[B, N, n]`` of priors and deltas."""

    scores: Tensor
    factors: Tensor
    labels: Tensor
    priors: Tensor
    deltas: Tensor


def _scores(head: Any, level: Tensor) -> Tensor:
    """Of one level, ``[B, anchors, classes]``, without the background."""
    level = level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, head.cls_out_channels)
    return level.sigmoid() if head.use_sigmoid_cls else level.softmax(-1)[..., :-1]


def lower_threshold(head: Any, outputs: Sequence[Sequence[Tensor]], count: int = 64) -> float:
    """A ``score_thr`` that so many of the scores in a batch exceed, but for ties."""
    every = torch.cat([_scores(head, level).flatten() for level in outputs[0]])
    return float(every.topk(min(count + 1, len(every))).values[-2:].mean())


def _candidates(
    head: Any,
    scores: Tensor,
    deltas: Tensor,
    factors: Tensor | None,
    priors: Tensor,
    score_thr: Tensor | float,
) -> _Candidates:
    """The ``nms_pre`` best pairs of an anchor and a class, of one level."""
    from mmdet.structures.bbox import get_box_tensor

    scores = _scores(head, scores)
    batch, _, classes = scores.shape
    scores = scores.flatten(1)
    scores = torch.where(scores > score_thr, scores, ABSENT)
    scores, index = scores.topk(smaller(scores.shape[1], head.test_cfg.nms_pre))
    anchors = torch.div(index, classes, rounding_mode="floor")
    deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, head.bbox_coder.encode_size)
    if factors is None:
        chosen = torch.ones_like(scores)
    else:
        chosen = factors.permute(0, 2, 3, 1).reshape(batch, -1).gather(1, anchors).sigmoid()
    return _Candidates(
        scores,
        chosen,
        index - anchors * classes,
        get_box_tensor(priors)[anchors],
        deltas.gather(1, anchors[..., None].expand(-1, -1, deltas.shape[2])),
    )


def sizes_of_images(images: Tensor, padded: bool) -> Tensor:
    """(height, width) in pixels of each image, int64 ``[B, 2]``.

    Args:
        images: a batch, filled up with zeros at the bottom and on the right.
        padded: False if such zeros are part of the images.
    """
    there = inside(images) if padded else None
    if there is None:
        return torch.tensor(images.shape[2:]).repeat(images.shape[0], 1)
    return torch.stack([along.sum(1) for along in there], 1)


def detections(
    head: Any,
    outputs: Sequence[Sequence[Tensor]],
    sizes: Tensor,
    score_thr: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """What the head's ``predict`` finds, of a model that passed :func:`check`.

    Args:
        head: of a detector, with its ``test_cfg``.
        outputs: what it returns, scores and boxes and perhaps factors of the scores.
        sizes: from :func:`sizes_of_images`, to which boxes are clipped.
        score_thr: of the ``test_cfg``.

    Returns:
        ``dets``, ``[B, K, 5]`` for ``K = test_cfg.max_per_img``: (x1, y1, x2, y2, score), the
        highest score first, and zeros where an image has fewer; ``labels``, int64 ``[B, K]``, -1
        there.
    """
    from mmdet.structures.bbox import get_box_tensor

    scores, deltas, *rest = outputs
    factors = rest[0] if rest else [None] * len(scores)
    first, cfg = scores[0], head.test_cfg
    priors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in scores], dtype=first.dtype, device=first.device
    )
    parts = zip(scores, deltas, factors, priors)
    levels = [_candidates(head, *level, score_thr) for level in parts]
    every = _Candidates(*(torch.cat(part, 1) for part in zip(*levels)))
    boxes = head.bbox_coder.decode(every.priors.flatten(0, 1), every.deltas.flatten(0, 1))
    boxes = get_box_tensor(boxes).reshape(first.shape[0], -1, 4)
    if head.bbox_coder.clip_border:
        border = sizes.flip(1).repeat(1, 2)[:, None].to(boxes)  # [B, 1, 4]
        boxes = torch.minimum(boxes.clamp(min=0), border)
    present = every.scores > ABSENT
    if (smallest := cfg.get("min_bbox_size", -1)) >= 0:
        present = present & (boxes[..., 2:] - boxes[..., :2] > smallest).all(-1)
    found = torch.where(present, every.scores * every.factors, ABSENT)

    # As mmcv's batched_nms, rounding included: classes are moved apart.
    apart = boxes
    if not cfg.nms.get("class_agnostic", False):
        largest = boxes.masked_fill(~present[..., None], -torch.inf).flatten(1).amax(1)
        step = torch.where(present.any(1), largest, 0.0)[:, None] + 1
        apart = boxes + (every.labels.to(boxes) * step)[..., None]
    most = cfg.max_per_img
    kept = torch.ops.mmsoft_export.suppress(apart, found, cfg.nms.iou_threshold, most)
    # So many that are absent that there are always enough.
    best, index = F.pad(torch.where(kept, found, ABSENT), (0, most), value=ABSENT).topk(most)
    there = best > ABSENT
    labels = F.pad(every.labels, (0, most)).gather(1, index)
    boxes = F.pad(boxes, (0, 0, 0, most)).gather(1, index[..., None].expand(-1, -1, 4))
    dets = torch.cat((boxes, best[..., None]), 2)
    return torch.where(there[..., None], dets, 0.0), torch.where(there, labels, -1)


class _Found(NamedTuple):
    """Of one image."""

    boxes: Tensor  # [n, 4]
    scores: Tensor  # [n]
    labels: Tensor  # [n]

    def costs(self, other: "_Found", side: int, scale: float) -> Tensor:
        """``[n, m]``: how far boxes and scores are apart, inf for other labels."""
        boxes = (self.boxes[:, None] - other.boxes).abs().amax(2) / side
        scores = (self.scores[:, None] - other.scores).abs() / scale
        costs = torch.maximum(boxes, scores).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return costs.masked_fill(self.labels[:, None] != other.labels, torch.inf)


def compare_detections(
    head: Any,
    images: Tensor,
    sizes: Tensor,
    outputs: Sequence[Sequence[Tensor]],
    found: Sequence[Any],
    tolerance: float,
) -> list[Difference]:
    """By how much a program's detections differ from those of the model's head, in any order.

    What one of the two has alone is no difference where rounding decides, so that one of these is
    equal to within the tolerance: a class score and the threshold; the score and the last of
    ``max_per_img``; the scores of two candidates that overlap, or this overlap and the threshold of
    the suppression. What follows from such a detection, because it suppresses others, is none
    either. What the program has must in any case be among the model's candidates.

    Args:
        head: of a model that passed :func:`check`.
        images: ``[B, 3, H, W]``.
        sizes: theirs, from :func:`sizes_of_images`.
        outputs: what the head returns for them.
        found: ``dets`` and ``labels`` of the program, as from :func:`detections`.
        tolerance: of boxes, relative to the longer side of the images; of scores, to the largest;
            ten times as much of overlaps.

    Returns:
        One of the boxes and scores that both have, and one of the labels.

    Raises:
        ValueError: the shapes are others, or one has detections that the other has not.
    """
    dets, labels = (torch.as_tensor(each) for each in found)
    shapes = (len(images), most := head.test_cfg.max_per_img, 5), (len(images), most)
    if (dets.shape, labels.shape) != shapes:
        raise ValueError(
            f"dets and labels have shapes {tuple(dets.shape)} and {tuple(labels.shape)}, "
            f"not {shapes[0]} and {shapes[1]}"
        )
    side, total, rounded, error = max(images.shape[2:]), 0, 0, 0.0
    for image, ours in enumerate(_predictions(head, outputs, sizes)):
        there = labels[image] >= 0
        count = int(there.sum())
        rest = dets[image, count:], labels[image, count:] + 1
        if not there[:count].all() or any(part.any() for part in rest):
            raise ValueError("after the detections there are not zeros with labels of -1 alone")
        theirs = _Found(dets[image, :count, :4], dets[image, :count, 4], labels[image, :count])
        scale = max([torch.finfo(dets.dtype).tiny, *ours.scores.tolist()])
        costs = ours.costs(theirs, side, scale)
        free, alone = torch.ones(count, dtype=torch.bool), []
        for i, row in enumerate(costs):
            row = torch.where(free, row, torch.inf)
            best = int(row.argmin()) if count else 0
            if count and row[best] <= tolerance:
                free[best] = False
                error = max(error, float(row[best]))
            else:
                alone.append(i)
        both = torch.tensor(alone, dtype=torch.int64), free.nonzero().squeeze(1)
        total += len(ours.scores)
        if not (missing := sum(map(len, both))):
            continue
        slack = scale * tolerance
        wide, narrow = (
            _predictions(head, outputs, sizes, change)[image] for change in (-slack, slack)
        )
        sides = ours, theirs
        known, certain = (
            [(each.costs(pool, side, scale) <= tolerance).any(1) for each in sides]
            for pool in (wide, narrow)
        )
        explained = _by_rounding(head, sides, both, certain, slack, 10 * tolerance)
        explained[1] &= known[1]
        unclear = missing - int(sum(each.sum() for each in explained))
        if unclear:
            nearest = [costs[both[0]].amin(1), costs[:, both[1]].amin(0)] if costs.numel() else []
            farthest = max((float(d) for part in nearest for d in part), default=float("inf"))
            raise ValueError(
                f"of images {tuple(images.shape)}, model and program find {len(ours.scores)} and "
                f"{count} objects in number {image}: {missing} are not, within {tolerance:g}, in "
                f"the other, {unclear} of them not by rounding (differences up to "
                f"{farthest:.1e}), unless scores are equal at the nms_pre best; nothing was "
                "written"
            )
        rounded += missing
    note = f"{total} detections" + (f", {rounded} decided by rounding" if rounded else "")
    shape, (first, second) = tuple(images.shape), NAMES
    return [
        Difference(shape, first, shapes[0], error, found=total, note=note),
        Difference(shape, second, shapes[1], 0.0),
    ]


def _predictions(
    head: Any, outputs: Sequence[Any], sizes: Tensor, change: float | None = None
) -> list[_Found]:
    """What the head finds; with a change of ``score_thr``, its candidates for suppression."""
    from mmdet.structures.bbox import get_box_tensor

    cfg = copy.deepcopy(head.test_cfg)
    if change is not None:
        cfg.score_thr = cfg.get("score_thr", 0) + change
    metas = [dict(img_shape=tuple(size)) for size in sizes.tolist()]
    found = head.predict_by_feat(
        *outputs, batch_img_metas=metas, cfg=cfg, rescale=False, with_nms=change is None
    )
    return [_Found(get_box_tensor(f.bboxes), f.scores, f.labels) for f in found]


def _by_rounding(
    head: Any,
    sides: tuple[_Found, _Found],
    alone: tuple[Tensor, Tensor],
    certain: list[Tensor],
    score_slack: float,
    slack: float,
) -> list[Tensor]:
    """Which of the detections that one side has alone, bool ``[n]`` of each, rounding explains.

    ``certain`` are those whose class score is above the threshold by more than rounding.
    """
    from mmdet.structures.bbox import bbox_overlaps

    nms, most = head.test_cfg.nms, head.test_cfg.max_per_img
    explained, relations = [], []
    for mine, theirs, numbers, sure in zip(sides, sides[::-1], alone, certain):
        overlaps = bbox_overlaps(mine.boxes, theirs.boxes)
        if not nms.get("class_agnostic", False):
            overlaps = overlaps * (mine.labels[:, None] == theirs.labels)
        equal = (mine.scores[:, None] - theirs.scores).abs() <= score_slack
        near = overlaps >= nms.iou_threshold - slack
        close = near & (overlaps <= nms.iou_threshold + slack)
        rounded = (close | (near & equal)).any(1) | ~sure
        if len(theirs.scores) == most:
            rounded |= mine.scores <= theirs.scores.min() + score_slack
        own = torch.zeros_like(rounded)
        own[numbers] = rounded[numbers]
        explained.append(own)
        relations.append(near)
    for _ in range(max(map(len, alone))):
        for i in (0, 1):
            follows = (relations[i] & explained[1 - i]).any(1)
            explained[i][alone[i]] |= follows[alone[i]]
    return explained
