"""SOFT and SOFT++ softmax-free attention backbones for MMDetection, MMSegmentation, MMPreTrain.

Importing the package checks the versions of its core dependencies, makes ``mmsoft::`` config bases
resolvable, and lets torch load MMEngine's checkpoints. The models themselves are imported when a
config or a program first uses them.
"""

from mmsoft import integration as _integration
from mmsoft.version import __version__

_integration.check_versions()
_integration.register_config_prefix()
_integration.allow_checkpoints()

__all__ = ["__version__"]
