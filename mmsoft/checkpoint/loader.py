"""MMEngine's loading of checkpoints, made safe and extended to released files, for every model.

Importing this module registers it, for paths and web addresses, in the place of MMEngine's own: in
a config, ``custom_imports = dict(imports=["mmsoft.checkpoint.loader"])``. Wherever MMEngine loads a
checkpoint (``load_from``, ``init_cfg`` of a whole model, ``mim test``), nothing in the file is run
then, and a released file is an ordinary OpenMMLab checkpoint. The backbones' own ``init_cfg`` does
not need it.
"""

from pathlib import Path
from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local as _mmengine_load_from_local

from mmsoft.safe_globals import RESTRICTED, load

from .reading import HTTP, check_claims, download, refusals
from .released import NO_WEIGHTS, convert_released, is_released


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local file as MMEngine does, turning a released one into an OpenMMLab checkpoint.

    Raises:
        ValueError: see :func:`read_checkpoint`.
        FileNotFoundError: there is no such file, or ``pretrained=True`` asked for one of ours.
    """
    if filename == NO_WEIGHTS:
        raise FileNotFoundError(
            "mmsoft publishes no weights: give a file instead, as in pretrained='FILE'; those that "
            "the authors released are linked from https://github.com/fudan-zvg/SOFT"
        )
    path = Path(filename).expanduser()
    with refusals(path):
        if path.is_file():  # else MMEngine raises
            check_claims(path)
        if RESTRICTED or not path.is_file():
            checkpoint = _mmengine_load_from_local(filename, map_location)
        else:
            checkpoint = load(str(path), map_location)
    return convert_released(checkpoint) if is_released(checkpoint) else checkpoint


@CheckpointLoader.register_scheme(prefixes=HTTP, force=True)
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Load from the web, into the same cache as MMEngine, which would run code from the file.

    Raises:
        ValueError: see :func:`read_checkpoint`.
    """
    return load_from_local(str(download(filename)), map_location)
