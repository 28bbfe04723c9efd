# Mask R-CNN with SOFT++ Medium: a reconstructed recipe, from PVT's, as Tiny's.
_base_ = "./mask-rcnn_softpp-t_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="medium", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 288, 512]),
)
