# UperNet with SOFT++ Small: a reconstructed recipe, from Swin's, as Tiny's.
_base_ = "./upernet_softpp-t_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(arch="small", drop_path_rate=0.2))
