"""Rows of attention matrices, without the matrices: SOFT, softmax, Performer, Nystromformer.

Every function takes queries ``q [B, heads, N, d]`` that already carry the scale ``d^(-1/4)``, so
that ``q_i . q_j`` is the usual scaled dot product; keys equal queries, as in SOFT. All results are
float64 ``[B, heads, n, N]`` for ``n`` query tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmsoft.builder import require
from mmsoft.ops import (
    gaussian_gram,
    landmark_attention,
    newton_raphson_pinv,
    softmax_free_attention,
    step_size,
    tikhonov_pinv_product,
)
from mmsoft.ops.inverse import RIDGE_SOFT


def _check_queries(q: Tensor, queries: Sequence[int]) -> list[int]:
    if q.dim() != 4:
        raise ValueError(f"q must be [B, heads, N, d], got shape {tuple(q.shape)}")
    queries = [int(i) for i in queries]
    for i in queries:
        if not 0 <= i < q.shape[2]:
            raise ValueError(f"queries must be token numbers in [0, {q.shape[2]}), got {i}")
    if not queries:
        raise ValueError("queries must name at least one token")
    return queries


def _rows(q: Tensor, queries: Sequence[int], attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Rows of a matrix as gradients of its products with values: nothing ``[N, N]`` appears."""
    queries = _check_queries(q, queries)
    unit = torch.zeros(q.shape[2], len(queries), dtype=torch.float64, device=q.device)
    unit[queries, range(len(queries))] = 1
    unit = unit.expand(*q.shape[:2], -1, -1)
    with torch.enable_grad():
        values = torch.zeros_like(unit, requires_grad=True)
        out = attend(q.detach().double(), values)
    return torch.autograd.grad(out, values, unit)[0].mT


def landmark_rows(
    q: Tensor,
    landmarks: Tensor,
    queries: Sequence[int],
    present: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Rows of the matrix of :func:`mmsoft.ops.landmark_attention`: not negative, sums of 1.

    Args:
        q: ``[B, heads, N, d]``.
        landmarks: ``[B, heads, m, d]``.
        queries: token numbers, row by row of the grid.
        present: ``[B, heads, m]``, which landmarks there are.
        mask: ``[B, N]``, False for tokens that are padding: no row reads from them.

    Raises:
        ValueError: a query is not a token, or the shapes do not match.
    """
    landmarks = landmarks.detach().double()
    return _rows(q, queries, lambda q, v: landmark_attention(q, v, landmarks, present, mask=mask))


def rows_inside(
    rows: Callable[[Tensor, list[int]], Tensor],
    q: Tensor,
    queries: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """Rows of a method that knows no mask, such as :func:`softmax_rows`, on what is not padding.

    Args:
        rows: called with queries ``[1, heads, n, d]`` and token numbers among them.
        q: ``[B, heads, N, d]``.
        queries: token numbers, row by row of the grid.
        mask: ``[B, N]``, False for tokens that are padding, whose entries are 0; ``None`` for none.

    Raises:
        ValueError: a query is not a token, or is padding.
    """
    queries = _check_queries(q, queries)
    if mask is None:
        return rows(q, queries)
    out = q.new_zeros(*q.shape[:2], len(queries), q.shape[2], dtype=torch.float64)
    for own, points, there in zip(out, q, mask):
        if not bool(there[queries].all()):
            raise ValueError("a query is padding")
        number = there.cumsum(0) - 1
        own[..., there] = rows(points[None, :, there], number[queries].tolist())[0]
    return out


def attention_rows(
    q: Tensor,
    landmarks: Tensor,
    queries: Sequence[int],
    *,
    normalize: bool = True,
    solver: str = "newton",
    steps: int = 20,
) -> Tensor:
    """Rows of ``K1 D^-1/2 A^+ D^-1/2 K1^T`` (SOFT++; SOFT leaves out ``D``), in float64.

    Entries may be negative and rows do not sum to 1.

    Args:
        q: ``[B, heads, N, d]``.
        landmarks: ``[B, heads, m, d]``.
        queries: token numbers, row by row of the grid.
        normalize: see :func:`mmsoft.ops.softmax_free_attention`.
        solver: as for ``normalize``.
        steps: as for ``normalize``.

    Raises:
        ValueError: a query is not a token, or the shapes do not match.
    """
    landmarks = landmarks.detach().double()
    options = dict[str, Any](normalize=normalize, solver=solver, steps=steps)
    return _rows(q, queries, lambda q, v: softmax_free_attention(q, v, landmarks, **options))


@torch.no_grad()
def landmark_matrix(
    landmarks: Tensor, *, normalize: bool = True, solver: str = "newton", steps: int = 20
) -> Tensor:
    """What stands between the two kernels, ``D^-1/2 A^+ D^-1/2`` for SOFT++: ``[B, heads, m, m]``.

    Args:
        landmarks: ``[B, heads, m, d]``.
        normalize: see :func:`mmsoft.ops.softmax_free_attention`.
        solver: likewise.
        steps: likewise.
    """
    a = gaussian_gram(landmarks.double())
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    if solver == "direct":
        pinv = tikhonov_pinv_product(a, eye)
    else:
        alpha, cubic = step_size(a, guarded=normalize)
        pinv = newton_raphson_pinv(a if normalize else a + RIDGE_SOFT * eye, alpha, cubic, steps)
    if not normalize:
        return pinv
    root = a.sum(-1, keepdim=True).rsqrt()
    return root * pinv * root.mT


@torch.no_grad()
def softmax_rows(q: Tensor, queries: Sequence[int]) -> Tensor:
    """Rows of ``softmax(q q^T)``: ordinary attention on the same queries."""
    queries = _check_queries(q, queries)
    q = q.double()
    return (q[:, :, queries] @ q.mT).softmax(-1)


@torch.no_grad()
def performer_rows(q: Tensor, queries: Sequence[int], seed: int = 0) -> Tensor:
    """Rows of Performer's attention matrix (FAVOR+, arXiv 2009.14794), by ``performer-pytorch``.

    Args:
        q: ``[B, heads, N, d]``.
        queries: token numbers.
        seed: of the random features, of which the package draws ``d ln d``.

    Raises:
        ImportError: the package is missing.
        ValueError: a query is not a token.
    """
    queries = _check_queries(q, queries)
    require("performer_pytorch")
    from performer_pytorch.performer_pytorch import FastAttention, softmax_kernel

    q = q.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = FastAttention(dim_heads=q.shape[-1]).projection_matrix.to(q)
    options = dict(projection_matrix=projection, normalize_data=False)  # q is scaled already
    rows = softmax_kernel(q[:, :, queries], is_query=True, **options)
    keys = softmax_kernel(q, is_query=False, **options)
    rows = rows @ keys.mT
    return rows / rows.sum(-1, keepdim=True)


@torch.no_grad()
def nystromformer_rows(q: Tensor, queries: Sequence[int], num_landmarks: int) -> Tensor:
    """Rows of Nystromformer's attention matrix (arXiv 2102.03902), by ``nystrom-attention``.

    Args:
        q: ``[B, heads, N, d]``.
        queries: token numbers.
        num_landmarks: landmarks, means over consecutive tokens.

    Raises:
        ImportError: the package is missing.
        ValueError: a query is not a token, or there are more landmarks than tokens.
    """
    queries = _check_queries(q, queries)
    batch, heads, n, d = q.shape
    if not 1 <= num_landmarks <= n:
        raise ValueError(f"num_landmarks must be in [1, {n}], got {num_landmarks}")
    require("nystrom_attention")
    from nystrom_attention import NystromAttention

    layer = NystromAttention(
        heads * d, dim_head=d, heads=heads, num_landmarks=num_landmarks, residual=False
    ).to(q.device, torch.float64)
    eye = torch.eye(heads * d, dtype=torch.float64, device=q.device)
    layer.to_qkv.weight.copy_(torch.cat((eye, eye, eye)))  # queries = keys = values = its input
    # The layer divides its queries by sqrt(d); ours carry the scale on both sides.
    x = q.double().transpose(1, 2).flatten(2) * d**0.25
    mask = torch.ones(batch, n, dtype=torch.bool, device=q.device)
    _, (first, inverse, last) = layer(x, mask=mask, return_attn_matrices=True)
    # It pads at the front to a multiple of the number of landmarks.
    return first[:, :, -n:][:, :, queries] @ inverse @ last[..., -n:]
