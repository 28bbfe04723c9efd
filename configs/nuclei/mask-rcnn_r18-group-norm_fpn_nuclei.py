# GroupNorm in place of BatchNorm, as in MMDetection's configs/gn.
_base_ = "./mask-rcnn_r18_fpn_nuclei.py"

model = dict(backbone=dict(norm_cfg=dict(type="GN", num_groups=32)))
