# Mask R-CNN on the nuclei: heads, data and schedule, which all backbones share. Random
# initialization, on a CPU within 40 minutes. A config adds the backbone and its neck's in_channels.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

strides = [4, 8, 16, 32]
rpn = dict(nms_pre=500, max_per_img=500)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1),  # tests fill nothing up: grey beside dark images
    neck=dict(out_channels=64, num_outs=4, norm_cfg=dict(type="GN", num_groups=16)),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # Anchors of 12 to 96 pixels; 98 % of the nuclei have 5 to 62.
        anchor_generator=dict(scales=[3], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=strides, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=strides, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=1),
    ),
    # A crop has up to 200 nuclei, a whole image up to 375. RoIAlign is slow on a CPU: fewer regions
    # are sampled for the losses than the default's 512.
    train_cfg=dict(rpn_proposal=rpn, rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(max_per_img=500)),
)

# Data: crops of 256x256 for training, whole images of their own size for validation.
data_root = "data/nuclei/"
metainfo = dict(classes=("nucleus",))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomCrop", crop_size=(256, 256), recompute_bbox=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(2, 2)),  # cut off by the border of the crop
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),  # no change, but it notes the scale factor
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
# No worker processes: the images are small, and times are then those of one process.
in_process = dict(num_workers=0, persistent_workers=False)
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=2,
    **in_process,
    sampler=dict(type="InfiniteSampler"),
    batch_sampler=None,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    **in_process,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/val/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator

# Schedule
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=700, val_interval=700)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="AdamW",
        lr=1e-3,
        weight_decay=0.05,
        fused=__import__("torch").__version__ >= "2.4",  # since then on a CPU too
    ),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(
            pos_embed=dict(decay_mult=0.0),
            cls_token=dict(decay_mult=0.0),
            relative_position_bias_table=dict(decay_mult=0.0),
        ),
    ),
    clip_grad=dict(max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=0, end=700),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type="mmsoft.CheckpointHook", by_epoch=False, interval=700, max_keep_ckpts=1),
)
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
