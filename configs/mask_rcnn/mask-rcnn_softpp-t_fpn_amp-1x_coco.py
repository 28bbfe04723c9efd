# Mixed precision. The attention's kernels and inverse stay in float32 by themselves.
_base_ = "./mask-rcnn_softpp-t_fpn_1x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
