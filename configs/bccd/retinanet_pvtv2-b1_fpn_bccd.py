_base_ = "./retinanet_pvtv2-b0_fpn_bccd.py"

model = dict(
    backbone=dict(embed_dims=64),
    neck=dict(in_channels=[128, 320, 512]),
)
