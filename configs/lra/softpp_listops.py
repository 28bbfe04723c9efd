_base_ = "./_base_/lra.py"

dataset = dict(type="mmsoft.ListOps", data_root="data/listops")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)

model = dict(
    backbone=dict(vocab_size=32, max_length=2000),
    head=dict(num_classes=10),
)
train_cfg = dict(max_iters=5000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=1000),
    dict(type="LinearLR", start_factor=1, end_factor=0, by_epoch=False, begin=1000, end=5000),
]
