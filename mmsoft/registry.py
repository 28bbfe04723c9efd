"""The registries of MMSOFT: children of MMEngine's, with scope ``mmsoft``.

MMEngine imports this module by itself when it first meets ``type='mmsoft.X'``, and the modules in
``locations`` when it first looks something up, so configs need no ``custom_imports``. It swallows
an ImportError raised here and reports only that ``X`` is not registered: keep this file free of
anything that can fail.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry("model", scope="mmsoft", parent=MMENGINE_MODELS, locations=["mmsoft.models"])
DATASETS = Registry(
    "dataset", scope="mmsoft", parent=MMENGINE_DATASETS, locations=["mmsoft.datasets"]
)
HOOKS = Registry("hook", scope="mmsoft", parent=MMENGINE_HOOKS, locations=["mmsoft.engine"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    scope="mmsoft",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=["mmsoft.engine"],
)

__all__ = ["DATASETS", "HOOKS", "MODELS", "OPTIM_WRAPPER_CONSTRUCTORS"]
