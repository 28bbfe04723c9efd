# RetinaNet with a small SOFT++ backbone on the generated shapes, from random initialization.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./_base_/shapes_instance.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch=dict(embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]),
    ),
    neck=dict(
        in_channels=[32, 64, 96, 128],
        out_channels=96,
        num_outs=3,
        norm_cfg=dict(type="GN", num_groups=16),
    ),
    bbox_head=dict(
        num_classes=5,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=16),
        anchor_generator=dict(strides=[8, 16, 32]),  # anchors of 32 to 200 pixels
        reg_decoded_bbox=True,
        loss_cls=dict(gamma=1.0, alpha=0.5),
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
        # MMDetection starts the classifier at 0.01: the classes' filters then begin alike, and the
        # many background anchors keep them so for hundreds of iterations.
        init_cfg=dict(
            type="Normal",
            layer="Conv2d",
            std=0.01,
            override=dict(type="Normal", name="retina_cls", std=0.03, bias_prob=0.01),
        ),
    ),
)

# RetinaNet predicts no masks.
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
