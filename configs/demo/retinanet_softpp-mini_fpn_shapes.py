# RetinaNet with a small SOFT++ backbone on the generated shapes, from random initialization.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
# Before anything else, so that inferencers can load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft"], allow_failed_imports=False)

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

# Data: 160 x 160 pixels, as generated.
data_root = "data/shapes/coco/"
metainfo = dict(classes=("disc", "bar", "triangle", "crescent", "cross"))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160)),  # no change, but it notes the scale factor of 1
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(min_size=1),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

# Schedule
train_cfg = dict(max_epochs=3, val_interval=3)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", eta_min=0, begin=0, end=3, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=1))
randomness = dict(seed=0)
