# One filter for all channels of a head, as released.
_base_ = "./mask-rcnn_softpp-mini_fpn_nuclei.py"

model = dict(backbone=dict(local_filters="head"))
