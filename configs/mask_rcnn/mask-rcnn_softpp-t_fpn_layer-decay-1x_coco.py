# A learning rate that decays by 0.9 a layer from the last to the first; the paper has none.
_base_ = "./mask-rcnn_softpp-t_fpn_1x_coco.py"

optim_wrapper = dict(
    constructor="mmsoft.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
