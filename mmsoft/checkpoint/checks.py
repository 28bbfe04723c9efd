"""Checks of state dicts: of which architecture, and with what tensors."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SOFTMAX_HEAD_DIMS = 32  # of every published model; stage 4's weights do not show it


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
    of_block = re.compile(rf"{re.escape(prefix)}stages\.\d+\.blocks\.\d+\.")
    blocks = {match[0] for match in map(of_block.match, weights) if match}
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
    others = [k for k in weights if k.startswith(prefix) and k[len(prefix) :] not in names]
    if others:
        raise ValueError(
            f"the checkpoint holds no {variant} backbone but keys such as {summary(others)}; "
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
        TypeError: an entry is not a tensor, or its dtype is of another kind.
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


def summary(names: Iterable[str], shown: int = 4) -> str:
    """Name the first few, and count the rest."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
