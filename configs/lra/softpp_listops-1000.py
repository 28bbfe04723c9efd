# Expressions of 500 to 1000 tokens: short enough for several seeds on a CPU.
_base_ = "./softpp_listops.py"

dataset = dict(data_root="data/listops-1000", max_length=1000)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
model = dict(backbone=dict(max_length=1000))
