_base_ = "./_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
