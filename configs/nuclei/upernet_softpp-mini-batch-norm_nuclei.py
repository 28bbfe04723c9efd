# BatchNorm in the patch embeddings, as released.
_base_ = "./upernet_softpp-mini_nuclei.py"

model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="BN")))
