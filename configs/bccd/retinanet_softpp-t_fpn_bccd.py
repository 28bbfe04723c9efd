_base_ = "./_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch="tiny",
        solver="direct",
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
