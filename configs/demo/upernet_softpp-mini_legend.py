# The data set that needs attention: `make_shapes.py data/legend --legend --size 128 --train 2000`.
_base_ = "./upernet_softpp-mini_shapes.py"

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(num_classes=4),
    auxiliary_head=dict(num_classes=4),
)

dataset = dict(
    data_root="data/legend/ade",
    metainfo=dict(
        classes=("background", "upright", "level", "checked"),
        palette=[[90, 90, 90], [230, 75, 60], [60, 130, 220], [245, 180, 40]],
    ),
)
train_dataloader = dict(batch_size=8, dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=2000, val_interval=500)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=0, by_epoch=False, begin=0, end=2000),
]
default_hooks = dict(checkpoint=dict(interval=1000))
