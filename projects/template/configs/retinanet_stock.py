# A config of MMDetection with another backbone, and nothing else changed.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="mmsoft.SOFTPlusPlus", arch="tiny"),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
