# UperNet with SOFT++ Tiny on ADE20K. The authors released no recipe: this is a reconstruction from
# Swin's, on which such results are commonly built (AdamW 6e-5 with weight decay 0.01; 8 GPUs with 2
# images each).
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
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
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    )
)
