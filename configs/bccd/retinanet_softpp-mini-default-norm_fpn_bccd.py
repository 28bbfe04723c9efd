# The default norms of the patch embeddings.
_base_ = "./retinanet_softpp-mini_fpn_bccd.py"

model = dict(backbone=dict(norm_cfg=None))
