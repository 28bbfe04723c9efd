_base_ = "./_base_/lra.py"

dataset = dict(type="mmsoft.GreyCIFAR10", data_root="data/cifar-10-batches-bin")
train_dataloader = dict(batch_size=256, dataset=dataset)
val_dataloader = dict(batch_size=256, dataset=dataset)
test_dataloader = dict(batch_size=256, dataset=dataset)

model = dict(
    backbone=dict(vocab_size=257, max_length=1024),
    head=dict(num_classes=10),
)
train_cfg = dict(max_iters=35000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=175),
    dict(type="LinearLR", start_factor=1, end_factor=0, by_epoch=False, begin=175, end=35000),
]
