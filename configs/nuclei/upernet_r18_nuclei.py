_base_ = "./_base_/upernet_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNetV1c",
        depth=18,
        norm_cfg=dict(type="BN", requires_grad=True),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
