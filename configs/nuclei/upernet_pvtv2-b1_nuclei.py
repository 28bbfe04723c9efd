_base_ = "./_base_/upernet_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.PyramidVisionTransformerV2",
        embed_dims=64,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
