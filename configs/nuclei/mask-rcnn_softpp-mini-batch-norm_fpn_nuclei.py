# BatchNorm in the patch embeddings, as released.
_base_ = "./mask-rcnn_softpp-mini_fpn_nuclei.py"

model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="BN")))
