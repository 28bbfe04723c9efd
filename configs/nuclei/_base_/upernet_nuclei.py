# UperNet on the nuclei: heads, data and schedule, which all backbones share. Random
# initialization, on a CPU within 40 minutes. A config adds the backbone and its heads' in_channels.
_base_ = "mmseg::upernet/upernet_r18_4xb4-160k_ade20k-512x512.py"
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

norm_cfg = dict(type="BN", requires_grad=True)
crop_size = (256, 256)
head = dict(channels=64, num_classes=2, dropout_ratio=0, norm_cfg=norm_cfg)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=crop_size),  # tests fill nothing up: grey beside dark images
    decode_head=head,
    auxiliary_head=head,
)

# Data: crops of 256x256 for training, whole images of their own size for validation.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",  # ADE20KDataset insists on its own 150 classes
    data_root="data/nuclei",
    metainfo=dict(classes=("background", "nucleus"), palette=[[90, 90, 90], [230, 75, 60]]),
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
)
# No worker processes: the images are small, and times are then those of one process.
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=4,  # the head normalizes over the batch alone where it pools to 1x1
    dataset=dict(
        ann_file="train.txt",
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=train_pipeline,
        **dataset,
    ),
    **loading,
)
val_dataloader = dict(
    dataset=dict(
        ann_file="val.txt",
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=test_pipeline,
        **dataset,
    ),
    **loading,
)
test_dataloader = val_dataloader

# Schedule
train_cfg = dict(max_iters=500, val_interval=500)
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
    clip_grad=dict(_delete_=True, max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=0, end=500),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type="mmsoft.CheckpointHook", interval=500, max_keep_ckpts=1),
)
log_processor = dict(window_size=10)
randomness = dict(seed=0)
