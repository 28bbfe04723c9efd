# One filter for all channels of a head, as released.
_base_ = "./upernet_softpp-mini_nuclei.py"

model = dict(backbone=dict(local_filters="head"))
