_base_ = "./retinanet_softpp-t_fpn_1x_coco.py"

model = dict(backbone=dict(arch="large", drop_path_rate=0.3))
