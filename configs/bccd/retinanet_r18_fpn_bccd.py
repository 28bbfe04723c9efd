_base_ = "./_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=18,
        norm_eval=False,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
