_base_ = "./mask-rcnn_softpp-mini_fpn_shapes.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PyramidVisionTransformer",
        num_layers=[2, 2, 2, 2],
        out_indices=(1, 2, 3),
        init_cfg=None,
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
