# The protocol of Nystromformer (arXiv 2102.03902), which later comparisons follow.
_base_ = "mmpretrain::_base_/default_runtime.py"
# Safe reading of checkpoints, before anything else.
custom_imports = dict(imports=["mmsoft.checkpoint.loader"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(type="mmsoft.SequencePreprocessor"),
    backbone=dict(type="mmsoft.SequenceSOFTPlusPlus", solver="direct", drop_rate=0.1),
    head=dict(type="StackedLinearClsHead", in_channels=64, mid_channels=[128]),
)

pipeline = [dict(type="PackInputs", input_key="tokens")]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type="pseudo_collate"),  # the preprocessor pads
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(split="train", pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(split="val", pipeline=pipeline),
)
test_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(split="test", pipeline=pipeline),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = dict(type="Accuracy", topk=(1,))

train_cfg = dict(type="IterBasedTrainLoop", val_interval=1000)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-4, eps=1e-6, weight_decay=0.0),
    paramwise_cfg=dict(  # for those who ask for decay
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="mmsoft.CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
