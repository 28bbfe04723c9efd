"""Attention layers of other packages, which `pip install "mmsoft[peers]"` brings."""

from importlib import import_module
from typing import Any

from torch import nn

from mmsoft.builder import require

# Projections included, each with the package's own defaults: projections to 256 (Linformer), 110
# random features (Performer), 256 landmarks (Nystromformer).
PEERS = {
    "linformer": ("linformer", "LinformerSelfAttention"),
    "performer": ("performer_pytorch", "SelfAttention"),
    "nystromformer": ("nystrom_attention", "NystromAttention"),
}


def build_peer(
    name: str, embed_dims: int, num_heads: int, tokens: int, **options: Any
) -> nn.Module:
    """Build the layer of a peer, called with tokens ``[B, N, C]``.

    Args:
        name: a key of ``PEERS``.
        embed_dims: channels ``C``.
        num_heads: heads.
        tokens: the largest number of tokens, which Linformer has to know.
        options: of the package's class.

    Raises:
        ImportError: the package is not installed.
    """
    package, kind = PEERS[name]
    require(package)
    if name == "linformer":
        options = dict(seq_len=tokens) | options
    else:
        options = dict(dim_head=embed_dims // num_heads) | options
    return getattr(import_module(package), kind)(embed_dims, heads=num_heads, **options)
