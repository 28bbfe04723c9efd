# One filter for all channels of a head, as released.
_base_ = "./retinanet_softpp-mini_fpn_bccd.py"

model = dict(backbone=dict(local_filters="head"))
