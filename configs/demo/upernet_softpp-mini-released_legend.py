_base_ = "./upernet_softpp-mini_legend.py"

model = dict(backbone=dict(landmarks="released"))
