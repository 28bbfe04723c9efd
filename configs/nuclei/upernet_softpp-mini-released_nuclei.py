_base_ = "./upernet_softpp-mini_nuclei.py"

model = dict(backbone=dict(landmarks="released", solver="direct"))
