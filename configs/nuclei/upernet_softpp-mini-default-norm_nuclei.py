# The default norms of the patch embeddings.
_base_ = "./upernet_softpp-mini_nuclei.py"

model = dict(backbone=dict(norm_cfg=None))
