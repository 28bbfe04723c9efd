# A config of MMSegmentation with another backbone, and nothing else changed.
_base_ = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
model = dict(
    pretrained=None,  # the base's is a ResNet
    backbone=dict(_delete_=True, type="mmsoft.SOFTPlusPlus", arch="tiny"),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
