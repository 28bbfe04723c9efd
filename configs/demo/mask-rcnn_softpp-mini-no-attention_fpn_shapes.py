_base_ = "./mask-rcnn_softpp-mini_fpn_shapes.py"

__import__("sys").path.append("{{ fileDirname }}/../../tools/analysis_tools")
custom_imports = dict(imports=["no_attention"], allow_failed_imports=False)

model = dict(backbone=dict(type="mmsoft.SOFTPlusPlusNoAttention"))
