_base_ = "./_base_/upernet_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmsoft.SOFTPlusPlus",
        arch=dict(embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]),
        norm_cfg=dict(type="GN", num_groups=16),
    ),
    decode_head=dict(in_channels=[32, 64, 96, 128]),
    auxiliary_head=dict(in_channels=96),
)
