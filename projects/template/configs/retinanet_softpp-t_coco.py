# A config of ours, on smaller images.
_base_ = __import__("mmsoft") and "mmsoft::retinanet/retinanet_softpp-t_fpn_1x_coco.py"

# Smaller images than the base's.
scale = (160, 96)
train_dataloader = dict(dataset=dict(filter_cfg=dict(min_size=1)))
_base_.train_dataloader.dataset.pipeline[2].scale = scale
_base_.val_dataloader.dataset.pipeline[1].scale = scale
_base_.test_dataloader.dataset.pipeline[1].scale = scale
