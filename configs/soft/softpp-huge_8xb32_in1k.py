# SOFT++ Huge on ImageNet-1k by the authors' released recipe (8 GPUs assumed).
_base_ = "softpp-medium_8xb32_in1k.py"

model = dict(backbone=dict(arch="huge"))

optim_wrapper = dict(optimizer=dict(lr=2.7e-4))
