# SOFT Large on ImageNet-1k by the authors' released recipe.
_base_ = "softpp-large_8xb32_in1k.py"

model = dict(backbone=dict(type="mmsoft.SOFT"))
