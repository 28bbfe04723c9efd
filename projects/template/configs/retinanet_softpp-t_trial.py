# A first trial of the config for your own data: one epoch of small images.
_base_ = "retinanet_softpp-t_mydata.py"

train_cfg = dict(max_epochs=1)

scale = (256, 160)
_base_.train_dataloader.dataset.pipeline[2].scale = scale
_base_.val_dataloader.dataset.pipeline[1].scale = scale
_base_.test_dataloader.dataset.pipeline[1].scale = scale
