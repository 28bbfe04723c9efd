"""Checkpoints: the authors' released files in our terms, and loading into a backbone.

A released file is what timm's saver writes: a dict with ``state_dict``, mostly ``state_dict_ema``,
and a pickled ``argparse.Namespace`` under ``args``. Importing this module lets MMEngine read such a
file wherever it takes a local path (``load_from``, ``init_cfg`` of a whole model, ``mim test``): it
then sees an ordinary OpenMMLab checkpoint.
"""

import argparse
import mmap
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local as _mmengine_load_from_local
from torch import Tensor, nn

from mmsoft.unpickling import ClaimCheck
from mmsoft.version import __version__

# The one class that released files need beyond tensors and plain values. It only holds attributes.
torch.serialization.add_safe_globals([argparse.Namespace])

# Applied in order to the released name of a parameter.
_RENAMES = [
    (r"^module\.", lambda m: ""),
    (r"^patch_embed(\d)\.proj\.(\d)\.", lambda m: _patch_embed(int(m[1]), int(m[2]))),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^cls_token$", lambda m: "stages.3.cls_token"),
    (r"^block(\d)\.(\d+)\.(?:att\.)?", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.mha\.W_q\.", lambda m: ".attn.query."),
    (r"\.mha\.W_v\.", lambda m: ".attn.value."),
    (r"\.mha\.ff\.", lambda m: ".attn.proj."),
    (r"\.mha\.attn\.Qlandmark_op\.", lambda m: ".attn.landmark_conv."),
    (r"\.mha\.attn\.Qnorm_act\.0\.", lambda m: ".attn.landmark_norm."),
    (r"\.mha\.attn\.conv\.", lambda m: ".attn.value_conv."),
    (r"\.ff1\.|\.mlp\.fc1\.", lambda m: ".mlp.0."),
    (r"\.ff2\.|\.mlp\.fc2\.", lambda m: ".mlp.3."),
    (r"\.attn\.q\.", lambda m: ".attn.query."),
    (r"\.attn\.kv\.", lambda m: ".attn.key_value."),
    (r"^head\.", lambda m: "head.fc."),
]
_HTTP = ("http://", "https://")
_SOFTMAX_HEAD_DIMS = 32  # of every published model; stage 4's weights do not tell


def _patch_embed(stage: int, index: int) -> str:
    # The release numbers (conv, norm, ReLU) triples through.
    return f"stages.{stage - 1}.patch_embed.{index // 3}.{('conv', 'norm')[index % 3]}."


def convert_released_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's keys to ours (``stages.*``, ``norm.*``, ``head.fc.*``).

    Raises:
        ValueError: there are names that the release does not have.
    """
    converted = {}
    for name, value in state_dict.items():
        for pattern, replace in _RENAMES:
            name = re.sub(pattern, replace, name)
        converted[name] = value
    if strange := [
        name for name in converted if not name.startswith(("stages.", "norm.", "head."))
    ]:
        raise ValueError(f"released checkpoint has unknown keys: {_summary(strange)}")
    return converted


def is_released(checkpoint: Any) -> bool:
    """Whether a loaded file is a SOFT or SOFT++ checkpoint in the authors' format."""
    if not isinstance(checkpoint, dict):
        return False
    weights = checkpoint.get("state_dict", checkpoint)
    return isinstance(weights, dict) and bool(
        {"block1.0.att.mha.W_q.weight", "module.block1.0.att.mha.W_q.weight"} & set(weights)
    )


def convert_released(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a released checkpoint into an OpenMMLab one.

    The EMA weights are taken where the file has them, because the authors trained with EMA and
    published the better of the two.

    Args:
        checkpoint: the content of the file, see :func:`is_released`.

    Returns:
        ``state_dict`` with ``backbone.*`` and ``head.fc.*``, the names of a classifier; and
        ``meta``, whose ``released`` tells what was found: ``weights`` (the key they came from),
        ``variant`` (``'SOFT'``, ``'SOFT++'``, or ``None`` if the file does not say), ``arch``
        (:func:`infer_arch`), ``epoch``.

    Raises:
        ValueError: the file has keys that the release does not.
    """
    key = "state_dict_ema" if checkpoint.get("state_dict_ema") else "state_dict"
    weights = convert_released_keys(checkpoint.get(key, checkpoint))
    # Both classes have the same keys; only timm's model name tells: soft_tiny, soft_norm_tiny.
    name = getattr(checkpoint.get("args"), "model", None) or checkpoint.get("arch")
    match = re.match(r"soft_(norm_)?", name.lower()) if isinstance(name, str) else None
    variant = None if match is None else "SOFT++" if match[1] else "SOFT"
    state_dict = OrderedDict(
        (name if name.startswith("head.") else f"backbone.{name}", value)
        for name, value in weights.items()
    )
    # Handed by load_state_dict to each module, where the backbone checks it.
    state_dict._metadata = {"backbone": {"variant": variant}}  # type: ignore[attr-defined]
    released = dict(
        weights=key, variant=variant, arch=infer_arch(weights), epoch=checkpoint.get("epoch")
    )
    return dict(meta=dict(mmsoft_version=__version__, released=released), state_dict=state_dict)


def infer_arch(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, list[int]]:
    """Read the architecture from a backbone's weights under our names.

    Args:
        weights: a state dict.
        prefix: what precedes the backbone's own names in it.

    Returns:
        What :func:`mmsoft.models.backbones.arch.resolve_arch` takes, for as many stages as there
        are. ``landmark_strides`` is missing where landmarks are averages, which leave no weights;
        the heads of stage 4 leave none either and are taken to have 32 channels, as published.
    """
    arch: dict[str, list[int]] = dict(
        embed_dims=[], depths=[], num_heads=[], landmark_strides=[], value_kernels=[]
    )
    blocks = {
        m[0]
        for m in (re.match(rf"{re.escape(prefix)}stages\.\d+\.blocks\.\d+\.", k) for k in weights)
        if m
    }
    stage = 0
    while (pos_embed := weights.get(f"{prefix}stages.{stage}.pos_embed")) is not None:
        start = f"{prefix}stages.{stage}.blocks."
        attn = f"{start}0.attn."
        arch["embed_dims"].append(pos_embed.shape[-1])
        arch["depths"].append(sum(block.startswith(start) for block in blocks))
        norm = weights.get(f"{attn}landmark_norm.weight")
        head_dims = _SOFTMAX_HEAD_DIMS if norm is None else norm.shape[0]
        arch["num_heads"].append(max(pos_embed.shape[-1] // head_dims, 1))
        for key, name in (("landmark_strides", "landmark_conv"), ("value_kernels", "value_conv")):
            if (kernel := weights.get(f"{attn}{name}.weight")) is not None:
                arch[key].append(kernel.shape[-1])
        stage += 1
    return {key: values for key, values in arch.items() if values}


def check_arch(
    weights: Mapping[str, Tensor], prefix: str, arch: Mapping[str, list[int]], stages: int
) -> None:
    """Check that a backbone's weights fit its architecture.

    Args:
        weights: a state dict.
        prefix: what precedes the backbone's own names in it.
        arch: the resolved architecture of the backbone.
        stages: how many stages it has built; the others are not compared.

    Raises:
        ValueError: they differ; the message names what the checkpoint and the config have.
    """
    contradictions = []
    for key, found in infer_arch(weights, prefix).items():
        compared = min(stages, 3 if key == "num_heads" else 4, len(found))
        if found[:compared] != arch[key][:compared]:
            contradictions.append(f"{key} {found} but the config has {arch[key]}")
    if contradictions:
        raise ValueError(
            f"the checkpoint has {'; '.join(contradictions)}; change the arch of the config's "
            "backbone, or name another checkpoint"
        )


def check_is_ours(
    weights: Mapping[str, Tensor], prefix: str, names: Collection[str], variant: str
) -> None:
    """Check that weights without position embeddings are at most a part of a backbone's.

    Args:
        weights: a state dict.
        prefix: what precedes the backbone's own names in it.
        names: the backbone's own names.
        variant: what to call the backbone in the message.

    Raises:
        ValueError: there are others under the prefix, so they are of another backbone.
    """
    strange = [k for k in weights if k.startswith(prefix) and k[len(prefix) :] not in names]
    if strange:
        raise ValueError(
            f"the checkpoint holds no {variant} backbone but keys such as {_summary(strange)}; "
            "name a checkpoint of this config's model, or change the config's backbone"
        )


def check_tensors(weights: Mapping[str, Any], prefix: str, own: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds ordinary tensors of the right kind where a module has its own.

    ``load_state_dict`` would cast whatever it finds, complex numbers included, and a few stored
    bytes can claim any shape.

    Args:
        weights: a state dict.
        prefix: what precedes the module's own names in it.
        own: the state dict of the module. Shapes are left to ``load_state_dict``.

    Raises:
        TypeError: an entry is no tensor, or its dtype is of another kind.
        ValueError: a tensor is sparse or quantized, has another number of dimensions, or claims
            more elements than it stores.
    """
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, the checkpoint has {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} must be dense and not quantized in the checkpoint")
        # Subclasses, such as FSDP's shards, keep their storage elsewhere.
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
        if plain and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} claims the shape {tuple(tensor.shape)} but the checkpoint stores only "
                f"{tensor.untyped_storage().nbytes()} bytes of it"
            )
        ours = own.get(name[len(prefix) :])
        if ours is None:
            continue
        if _kind(tensor) != _kind(ours):
            raise TypeError(f"{name} is {tensor.dtype} in the checkpoint but {ours.dtype} here")
        if tensor.dim() != ours.dim():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint but "
                f"{tuple(ours.shape)} here"
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating point"
    return "complex" if tensor.is_complex() else "integer"


def read_checkpoint(path: str | Path, map_location: Any = "cpu", lazily: bool = False) -> Any:
    """Read a checkpoint without running anything that it might contain.

    Args:
        path: a local file, or a URL or other scheme that MMEngine knows.
        map_location: as in :func:`torch.load`.
        lazily: leave the tensors of a local file on the disk until they are used, where the file is
            in torch's present format.

    Raises:
        ValueError: the file is no checkpoint, is truncated, holds objects other than tensors, plain
            values, ``argparse.Namespace`` and what MMEngine's own checkpoints hold, or would unpack
            to more than its size.
    """
    if "://" in str(path) and not str(path).startswith(_HTTP):
        with _refusals(path):
            return CheckpointLoader.load_checkpoint(str(path), map_location)
    path = _download(path) if str(path).startswith(_HTTP) else Path(path).expanduser()
    with _refusals(path):
        lazily = _check_claims(path) and lazily
        return torch.load(str(path), map_location=map_location, weights_only=True, mmap=lazily)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local file as MMEngine does, turning a released one into an OpenMMLab checkpoint.

    Raises:
        ValueError: see :func:`read_checkpoint`.
    """
    path = Path(filename).expanduser()
    with _refusals(path):
        if path.is_file():  # else MMEngine says so
            _check_claims(path)
        checkpoint = _mmengine_load_from_local(filename, map_location)
    return convert_released(checkpoint) if is_released(checkpoint) else checkpoint


@CheckpointLoader.register_scheme(prefixes=_HTTP, force=True)
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Load from the web, into the same cache as MMEngine, which would run code from the file.

    Raises:
        ValueError: see :func:`read_checkpoint`.
    """
    return load_from_local(str(_download(filename)), map_location)


def _download(url: str | Path) -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(str(url)).path).name)
    if get_rank() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(url), str(path), progress=os.isatty(0))
    barrier()
    if not path.exists():  # the main process has a disk of its own
        torch.hub.download_url_to_file(str(url), str(path), progress=False)
    return path


def _check_claims(path: Path) -> bool:
    """Refuse a file that would unpack to more than its size.

    Returns:
        Whether it is in torch's present format, a zip file.
    """
    size = path.stat().st_size
    check = ClaimCheck(size)
    with open(path, "rb") as file:
        if size == 0:
            raise EOFError("it is empty")
        if file.read(4) == b"PK\3\4":  # as torch tells them apart
            if not zipfile.is_zipfile(file):
                raise EOFError("truncated, its table of contents at the end is missing")
            reader = torch._C.PyTorchFileReader(str(path))
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > size:
                raise UnpicklingError("refused: its content unpacks to more than the file's size")
            check.follow(BytesIO(reader.get_record("data.pkl")))
            return True
        if path.suffix != ".safetensors":  # torch's older format: five pickles before the tensors
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for _ in range(5):
                    check.follow(content)
        return False


@contextmanager
def _refusals(path: str | Path) -> Iterator[None]:
    """Say what is wrong with the file instead of how to load it all the same."""
    try:
        yield
    except UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        refused = re.search(r"refused:? (.*)", str(error))
        if refused:
            raise ValueError(f"{path} is refused: {refused[1]}") from None
        if unsafe is None:
            raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None
        raise ValueError(
            f"{path} is refused and nothing in it was run: it pickles {unsafe[1]}, where a "
            "checkpoint may hold only tensors, plain values and argparse.Namespace"
        ) from None
    except (OSError, ImportError):
        raise
    except Exception as error:  # torch's readers raise all kinds for files that are corrupt
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason[0]}") from error


def load_backbone(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None, map_location: Any = "cpu"
) -> None:
    """Load a backbone from a released file, or from any checkpoint that contains such a backbone.

    Unlike MMEngine's ``Pretrained``, which logs what does not fit and goes on, every parameter must
    be found and fit. What is left out on purpose (stages that ``out_indices`` does not build, heads
    and necks) is counted in one line of the log.

    Args:
        backbone: a SOFT or SOFT++ backbone.
        checkpoint: see :func:`read_checkpoint`.
        prefix: what precedes the backbone's names in the checkpoint, e.g. ``'backbone.'``; found if
            not given.
        map_location: as in :func:`torch.load`.

    Raises:
        ValueError: the file is refused, has no such backbone, or another architecture or variant.
        RuntimeError: parameters are missing, unexpected, or of another shape.
    """
    content = read_checkpoint(checkpoint, map_location)
    if is_released(content):
        content = convert_released(content)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{checkpoint} must hold a dict of tensors by name")
    prefix = _find_prefix(weights, prefix, checkpoint)
    metadata = getattr(weights, "_metadata", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    own = OrderedDict((k[len(prefix) :], v) for k, v in weights.items() if k.startswith(prefix))
    own._metadata = {  # type: ignore[attr-defined]
        f"{k}."[len(prefix) :].rstrip("."): v
        for k, v in metadata.items()
        if f"{k}.".startswith(prefix)
    }
    stages = len(list(backbone.get_submodule("stages").children()))
    later = [k for k in own if (m := re.match(r"stages\.(\d+)\.", k)) and int(m[1]) >= stages]
    if not hasattr(backbone, "norm"):
        later += [name for name in own if name.startswith("norm.")]
    for name in later:
        del own[name]
    try:
        missing, unexpected = backbone.load_state_dict(own, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"{checkpoint}: {error}") from None
    problems = [
        f"{len(names)} {what}: {_summary(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise RuntimeError(f"{checkpoint} does not fit the backbone; {'; '.join(problems)}")
    meta = content.get("meta")
    released = meta.get("released") if isinstance(meta, dict) else None
    source = released.get("weights") if isinstance(released, dict) else None
    origin = f" (released, {source})" if isinstance(source, str) else ""
    left = [f"{len(later)} of stages not built"] if later else []
    if others := len(weights) - len(own) - len(later):
        left.append(f"{others} outside the backbone")
    print_log(
        f"loaded all {len(own)} tensors of the backbone from {checkpoint}{origin}"
        + (f"; left out {' and '.join(left)}" if left else ""),
        logger="current",
    )


def _find_prefix(weights: Mapping[str, Any], prefix: str | None, source: str) -> str:
    mark = "stages.0.pos_embed"
    found = sorted(k.removesuffix(mark) for k in weights if re.search(rf"(^|\.){mark}$", k))
    if prefix is not None:
        prefix = prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
        if prefix in found:
            return prefix
    elif len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{source} holds no SOFT backbone; its keys are {_summary(map(str, weights))}"
        )
    raise ValueError(
        f"{source} holds backbones under {found}, the prefix given is {prefix!r}; "
        "name one in init_cfg, as prefix=..."
    )


def _summary(names: Iterable[str], shown: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
