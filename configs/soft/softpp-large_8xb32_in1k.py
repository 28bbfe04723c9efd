# SOFT++ Large on ImageNet-1k by the authors' released recipe (8 GPUs assumed).
_base_ = "softpp-medium_8xb32_in1k.py"

model = dict(backbone=dict(arch="large"))

optim_wrapper = dict(optimizer=dict(lr=3.3e-4))
