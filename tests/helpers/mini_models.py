"""The smallest model of each library around the golden backbone."""

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from released import ARCH

STRIDES = [4, 8, 16, 32, 64]
# Of detectors with one stage, beside RetinaNet's; without the norm of their towers.
DENSE_HEADS = {
    "FCOSHead": dict(type="mmdet.FCOSHead", strides=STRIDES, norm_cfg=None),
    "ATSSHead": dict(
        type="mmdet.ATSSHead",
        norm_cfg=None,
        anchor_generator=dict(
            type="mmdet.AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=STRIDES,
        ),
        bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
    ),
    "YOLOXHead": dict(type="mmdet.YOLOXHead", strides=STRIDES),
}


def dims_of(backbone):
    """Channels of the features that it returns."""
    stages = backbone.get("out_indices", range(4))
    return [ARCH["embed_dims"][stage] for stage in stages]


def mini_detector(**backbone):
    return dict(
        type="mmdet.RetinaNet",
        data_preprocessor=dict(type="mmdet.DetDataPreprocessor"),
        backbone=dict(type="mmsoft.SOFTPlusPlus", arch=ARCH, **backbone),
        neck=dict(type="mmdet.FPN", in_channels=dims_of(backbone), out_channels=16, num_outs=5),
        bbox_head=dict(
            type="mmdet.RetinaHead",
            num_classes=2,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type="mmdet.AnchorGenerator", scales=[8], ratios=[1.0], strides=STRIDES
            ),
            bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
            loss_cls=dict(type="mmdet.FocalLoss"),
            loss_bbox=dict(type="mmdet.L1Loss"),
        ),
        test_cfg=dict(nms_pre=10, score_thr=0.05, nms=dict(type="nms"), max_per_img=10),
    )


def mini_segmentor(**backbone):
    return dict(
        type="mmseg.EncoderDecoder",
        data_preprocessor=dict(type="mmseg.SegDataPreProcessor"),
        backbone=dict(type="mmsoft.SOFTPlusPlus", arch=ARCH, **backbone),
        decode_head=dict(
            type="mmseg.FCNHead",
            in_channels=dims_of(backbone)[-1],
            channels=16,
            num_convs=1,
            num_classes=2,
        ),
        test_cfg=dict(mode="whole"),
    )


def mini_classifier(**backbone):
    return dict(
        type="mmpretrain.ImageClassifier",
        backbone=dict(
            type="mmsoft.SOFTPlusPlus",
            arch=ARCH,
            out_indices=(3,),
            out_type="cls_token",
            **backbone,
        ),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=3, in_channels=128),
    )


LIBRARIES = {"mmdet": mini_detector, "mmseg": mini_segmentor, "mmpretrain": mini_classifier}


def import_library(library):
    """Skip the test where the library does not import."""
    pytest.importorskip(f"{library}.models", exc_type=(ImportError, RuntimeError))


def build(library, **backbone):
    """The library's model, built in its scope."""
    import_library(library)
    init_default_scope(library)
    return MODELS.build(ConfigDict(LIBRARIES[library](**backbone)))
