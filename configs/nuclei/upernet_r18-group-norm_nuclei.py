# GroupNorm in place of BatchNorm, as in MMDetection's configs/gn.
_base_ = "./upernet_r18_nuclei.py"

model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="GN", num_groups=32)))
