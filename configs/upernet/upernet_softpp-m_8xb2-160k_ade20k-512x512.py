# UperNet with SOFT++ Medium: a reconstructed recipe, from Swin's, as Tiny's.
_base_ = "./upernet_softpp-t_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="medium", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 288, 512]),
    auxiliary_head=dict(in_channels=288),
)
