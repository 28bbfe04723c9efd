# Instance data set and schedule of the demo: the generated shapes, 160 x 160 pixels.
_base_ = [
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

data_root = "data/shapes/coco/"
metainfo = dict(classes=("disc", "bar", "triangle", "crescent", "cross"))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160)),  # no change, but it notes the scale factor of 1
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
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
train_cfg = dict(max_epochs=3, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="AdamW",
        lr=2e-3,
        weight_decay=0.05,
        fused=__import__("torch").__version__ >= "2.4",  # since then on a CPU too
    ),
    clip_grad=dict(max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", eta_min=0, begin=0, end=3, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(type="mmsoft.CheckpointHook", interval=3, max_keep_ckpts=1))
randomness = dict(seed=0)
