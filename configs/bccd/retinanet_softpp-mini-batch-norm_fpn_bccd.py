# BatchNorm in the patch embeddings, as released.
_base_ = "./retinanet_softpp-mini_fpn_bccd.py"

model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="BN")))
