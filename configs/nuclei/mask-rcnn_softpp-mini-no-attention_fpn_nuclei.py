_base_ = "./mask-rcnn_softpp-mini_fpn_nuclei.py"

__import__("sys").path.append("{{ fileDirname }}/../../tools/analysis_tools")
imports = ["mmsoft.checkpoint.loader", "no_attention"]  # a list replaces that of the base
custom_imports = dict(imports=imports, allow_failed_imports=False)

model = dict(backbone=dict(type="mmsoft.SOFTPlusPlusNoAttention"))
