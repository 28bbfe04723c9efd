_base_ = "./upernet_softpp-mini_nuclei.py"

model = dict(
    backbone=dict(arch="tiny"),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
