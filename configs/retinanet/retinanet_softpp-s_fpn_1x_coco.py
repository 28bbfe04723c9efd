# RetinaNet with SOFT++ Small: a reconstructed recipe, from PVT's, as Tiny's.
_base_ = "./retinanet_softpp-t_fpn_1x_coco.py"

model = dict(backbone=dict(arch="small", drop_path_rate=0.2))
