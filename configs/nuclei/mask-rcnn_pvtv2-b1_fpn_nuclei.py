_base_ = "./mask-rcnn_pvtv2-b0_fpn_nuclei.py"

model = dict(
    backbone=dict(embed_dims=64),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
