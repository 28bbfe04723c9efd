# Your own data, with boxes in COCO's format.
_base_ = __import__("mmsoft") and "mmsoft::retinanet/retinanet_softpp-t_fpn_1x_coco.py"

data_root = "data/mydata/"
metainfo = dict(classes=("disc", "bar", "triangle", "crescent", "cross"))  # as in `categories`

model = dict(bbox_head=dict(num_classes=len(metainfo["classes"])))

train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
