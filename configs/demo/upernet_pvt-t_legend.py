_base_ = "./upernet_softpp-mini_legend.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.PyramidVisionTransformer",
        num_layers=[2, 2, 2, 2],
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
