# The detector on the data set that needs attention, see upernet_softpp-mini_legend.py.
_base_ = "./retinanet_softpp-mini_fpn_shapes.py"

model = dict(bbox_head=dict(num_classes=3))

data_root = "data/legend/coco/"
metainfo = dict(classes=("upright", "level", "checked"))
train_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root, metainfo=metainfo))
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),  # pictures of any size, as they are
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=8, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=0, begin=0, end=8, convert_to_iter_based=True),
]
