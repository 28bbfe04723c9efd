_base_ = "./mask-rcnn_softpp-mini_fpn_nuclei.py"

model = dict(
    backbone=dict(arch="tiny"),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
