_base_ = "./_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PyramidVisionTransformerV2",
        embed_dims=64,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
