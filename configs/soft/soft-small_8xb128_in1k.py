# SOFT Small on ImageNet-1k by the authors' released recipe.
_base_ = "softpp-small_8xb128_in1k.py"

model = dict(backbone=dict(type="mmsoft.SOFT"))
