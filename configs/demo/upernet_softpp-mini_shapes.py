# UperNet with a small SOFT++ backbone on the generated shapes, from random initialization.
_base_ = "mmseg::upernet/upernet_r18_4xb4-160k_ade20k-512x512.py"
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

norm_cfg = dict(type="BN", requires_grad=True)
# MMSegmentation starts the classifiers at 0.01: the shapes' rows then begin alike, and the many
# pixels of background keep them so for hundreds of iterations.
init_cfg = dict(type="Normal", std=0.1, override=dict(name="conv_seg"))
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch=dict(embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]),
    ),
    decode_head=dict(
        in_channels=[32, 64, 96, 128],
        channels=32,
        num_classes=6,
        dropout_ratio=0,  # under six passes over the data: nothing to regularize
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
    auxiliary_head=dict(
        in_channels=96,
        channels=32,
        num_classes=6,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
)

# Data: 160 x 160 pixels, as generated.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",  # ADE20KDataset insists on its own 150 classes
    data_root="data/shapes/ade",
    metainfo=dict(
        classes=("background", "disc", "bar", "triangle", "crescent", "cross"),
        palette=[
            [90, 90, 90],
            [230, 75, 60],
            [60, 130, 220],
            [245, 180, 40],
            [150, 80, 190],
            [60, 180, 110],
        ],
    ),
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset)
)
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# Schedule
train_cfg = dict(max_iters=1400, val_interval=350)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="AdamW",
        lr=2e-3,
        weight_decay=0.05,
        fused=__import__("torch").__version__ >= "2.4",  # since then on a CPU too
    ),
    clip_grad=dict(_delete_=True, max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=0, end=1400),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(type="mmsoft.CheckpointHook", interval=700, max_keep_ckpts=1),
)
randomness = dict(seed=0)
