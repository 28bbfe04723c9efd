# Mask R-CNN with a small SOFT++ backbone on the generated shapes, from random initialization.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./_base_/shapes_instance.py"]

strides = [8, 16, 32]
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch=dict(embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]),
        out_indices=(1, 2, 3),
    ),
    neck=dict(
        in_channels=[64, 96, 128],
        out_channels=96,
        num_outs=3,
        norm_cfg=dict(type="GN", num_groups=16),
    ),
    rpn_head=dict(
        in_channels=96,
        feat_channels=96,
        anchor_generator=dict(scales=[4], strides=strides),  # anchors of 32 to 128 pixels
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96, featmap_strides=strides),
        bbox_head=dict(in_channels=96, fc_out_channels=256, num_classes=5),
        mask_roi_extractor=dict(out_channels=96, featmap_strides=strides),
        mask_head=dict(num_convs=2, in_channels=96, conv_out_channels=64, num_classes=5),
    ),
    # Eight shapes at most are in an image: the defaults, made for 80 classes on large images, cost
    # more than the rest of the iteration.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
