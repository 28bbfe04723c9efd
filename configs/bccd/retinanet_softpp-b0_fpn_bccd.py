# The widths and depths of PVTv2-B0, to compare backbones of one size.
_base_ = "./retinanet_softpp-mini_fpn_bccd.py"

model = dict(
    backbone=dict(
        arch=dict(embed_dims=[32, 64, 160, 256], depths=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]),
    ),
    neck=dict(in_channels=[64, 160, 256]),
)
