# SOFT++ Medium on ImageNet-1k by the authors' released recipe: 32 images a GPU; that there were 8
# GPUs is our assumption.
_base_ = "softpp-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="medium"))

train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
auto_scale_lr = dict(base_batch_size=256)
