# The default norms of the patch embeddings.
_base_ = "./mask-rcnn_softpp-mini_fpn_nuclei.py"

model = dict(backbone=dict(norm_cfg=None))
