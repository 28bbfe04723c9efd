_base_ = "./retinanet_softpp-mini_fpn_bccd.py"

model = dict(
    backbone=dict(arch="tiny"),
    neck=dict(in_channels=[128, 320, 512]),
)
