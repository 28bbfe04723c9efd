# RetinaNet on the blood cells of BCCD: heads, data and schedule, which all backbones share. Random
# initialization, on a CPU within 40 minutes. A config adds the backbone and its neck's in_channels.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

norm_cfg = dict(type="GN", num_groups=16)
model = dict(
    neck=dict(start_level=0, out_channels=96, num_outs=3, norm_cfg=norm_cfg),  # strides 8, 16, 32
    bbox_head=dict(
        num_classes=3,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        # Anchors of 16 to 102 pixels; platelets have 14 to 34, white cells up to 126.
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
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

# Data: the photographs at half their size, 320x240.
data_root = "data/bccd/"
metainfo = dict(classes=("RBC", "WBC", "Platelets"))
scale = (320, 240)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=scale),
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale),
    dict(type="LoadAnnotations", with_bbox=True),
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
test_dataloader = dict(
    **in_process,
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_test.json",
        data_prefix=dict(img="images/test/"),
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_test.json")

# Schedule
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=800, val_interval=800)
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
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=0, end=800),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type="mmsoft.CheckpointHook", by_epoch=False, interval=800, max_keep_ckpts=1),
)
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
