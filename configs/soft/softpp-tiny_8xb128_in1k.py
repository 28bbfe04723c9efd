# SOFT++ Tiny on ImageNet-1k by the authors' released recipe.
_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"
# Safe reading of checkpoints, and of released ones wherever a config names them; before anything
# else, because inferencers load a checkpoint before they build the model.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type="mmsoft.CheckpointHook"))  # survives a kill

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch="tiny",
        out_indices=(3,),
        out_type="cls_token",
        landmarks="released",
        norm_cfg=dict(type="BN"),
        drop_path_rate=0.1,
    ),
    neck=None,
    head=dict(in_channels=512),
    init_cfg=None,  # the base's would reset the landmark norms
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-5, by_epoch=True, begin=10),
]
# The released momentum, 4e-5, from iteration 250000 on; before, 10 / (10 + iteration). The release
# has no such warm-up: after 5000 iterations 82 % of its average are the initial weights.
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="MomentumAnnealingEMA",
        momentum=4e-5,
        gamma=10,
        priority="ABOVE_NORMAL",
    )
]
# The base's has the scope of its package, which browse_dataset hands to the constructor.
visualizer = dict(
    _delete_=True, type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")]
)
