# Swin of about the mini model's size.
_base_ = "./upernet_softpp-mini_legend.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.SwinTransformer",
        embed_dims=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
    ),
    decode_head=dict(in_channels=[24, 48, 96, 192]),
    auxiliary_head=dict(in_channels=96),
)
