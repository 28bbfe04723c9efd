_base_ = "./_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch="tiny",
        solver="direct",
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
