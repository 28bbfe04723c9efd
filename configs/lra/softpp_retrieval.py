_base_ = "./_base_/lra.py"

dataset = dict(type="mmsoft.AANRetrieval", data_root="data/aan")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)

model = dict(
    backbone=dict(vocab_size=512, max_length=4000),
    head=dict(in_channels=256, num_classes=2),
)
train_cfg = dict(max_iters=30000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=800),
    dict(type="LinearLR", start_factor=1, end_factor=0, by_epoch=False, begin=800, end=30000),
]
