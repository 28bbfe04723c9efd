# RetinaNet with SOFT++ Tiny, COCO 1x. The authors released no recipe: this is a reconstruction from
# PVT's, of the same lab (AdamW 1e-4 with weight decay 1e-4; 8 GPUs with 2 images each).
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type="mmsoft.CheckpointHook"))  # survives a kill

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch="tiny",
        drop_path_rate=0.1,
        norm_eval=True,  # of released weights: two images are too few for BatchNorm
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
