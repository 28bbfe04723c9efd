"""SOFT and SOFT++ softmax-free attention backbones for MMDetection, MMSegmentation, MMPreTrain.

Importing the package checks the versions of its core dependencies, makes ``mmsoft::`` config bases
resolvable, and lets torch load MMEngine's checkpoints. The models themselves are imported when a
config or a program first asks for them.
"""

from mmsoft import compat as _compat
from mmsoft.version import __version__

_compat.check_versions()
_compat.register_config_prefix()
_compat.allow_mmengine_checkpoints()

__all__ = ["__version__"]
