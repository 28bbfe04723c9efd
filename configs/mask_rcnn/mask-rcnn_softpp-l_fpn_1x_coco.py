# Mask R-CNN with SOFT++ Large: a reconstructed recipe, from PVT's, as Tiny's.
_base_ = "./mask-rcnn_softpp-t_fpn_1x_coco.py"

model = dict(backbone=dict(arch="large", drop_path_rate=0.3))
