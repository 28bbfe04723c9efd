_base_ = "./_base_/upernet_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
