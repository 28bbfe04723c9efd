"""SOFT and SOFT++ softmax-free attention backbones for MMDetection, MMSegmentation, MMPreTrain.

Importing the package checks the versions of its dependencies, makes ``mmsoft::`` config bases
resolvable and our configs known to inferencers by name, and lets torch load MMEngine's checkpoints.
The models themselves are imported when a config or a program first uses them.
"""

from mmsoft import integration as _integration
from mmsoft.version import __version__

_integration.check_versions()
_integration.check_libraries()
_integration.register_config_prefix()
_integration.register_names()
_integration.allow_checkpoints()
_integration.announce_missing_weights()

__all__ = ["__version__"]
