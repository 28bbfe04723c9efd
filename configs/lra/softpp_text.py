_base_ = "./_base_/lra.py"

dataset = dict(type="mmsoft.IMDbBytes", data_root="data/aclImdb")
train_dataloader = dict(dataset=dataset)
val_dataloader = None  # there is no such split
val_evaluator = None
val_cfg = None
test_dataloader = dict(dataset=dataset)

model = dict(
    backbone=dict(vocab_size=512, max_length=4000),
    head=dict(num_classes=2),
)
train_cfg = dict(max_iters=20000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, by_epoch=False, end=8000),
    dict(type="LinearLR", start_factor=1, end_factor=0, by_epoch=False, begin=8000, end=20000),
]
