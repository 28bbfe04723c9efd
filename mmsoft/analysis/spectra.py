"""The inverse of the landmarks' Gram matrix: convergence, spectrum, filter, regions."""

from itertools import islice

import torch
from torch import Tensor

from mmsoft.ops import gaussian_gram, newton_iterates, newton_raphson_pinv, step_size
from mmsoft.ops.checks import SOLVERS
from mmsoft.ops.inverse import RIDGE_SOFT, TIKHONOV
from mmsoft.ops.island import compute_dtype, no_autocast

STEP_RULES = ("mmsoft", "released")
NORMS = ("2", "fro")

_TOKENS_AT_ONCE = 4096


def _check(landmarks: Tensor, **choices: tuple[str, tuple[str, ...]]) -> None:
    if landmarks.dim() != 4:
        raise ValueError(f"landmarks must be [B, heads, m, d], got shape {tuple(landmarks.shape)}")
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _norm(x: Tensor, norm: str) -> Tensor:
    """Norm of the symmetric matrices ``x [..., m, m]``, infinite where an entry is not finite."""
    finite = x.isfinite().all(-1).all(-1)
    x = x.where(finite[..., None, None], 0)
    if norm == "fro":
        result = torch.linalg.matrix_norm(x)
    else:
        result = torch.linalg.eigvalsh((x + x.mT) / 2).abs().amax(-1)
    return result.masked_fill(~finite, torch.inf)


@torch.no_grad()
def newton_residuals(
    landmarks: Tensor,
    *,
    normalize: bool = True,
    steps: int = 20,
    rule: str = "mmsoft",
    norm: str = "2",
) -> Tensor:
    """``||A A_k A - A||_p / ||A||_2`` of every Newton-Raphson iterate (SOFT, figure 5).

    The iteration runs in the dtype that the model uses, the norms in float64. For SOFT, which
    inverts ``A + 0.01 I``, that is the matrix.

    Args:
        landmarks: ``[B, heads, m, d]``.
        normalize: False for the step rule of SOFT, else that of SOFT++.
        steps: iterations ``T``.
        rule: ``'mmsoft'``, or ``'released'``: SOFT++'s maxima then run over the whole batch, and
            the start is not corrected (see :func:`mmsoft.ops.step_size`). SOFT has one rule.
        norm: ``'2'``, the spectral norm, or ``'fro'``, which costs no eigenvalues.

    Returns:
        ``[steps + 1, B, heads]``, float64; infinite where the iteration overflowed.

    Raises:
        ValueError: an argument is invalid.
    """
    _check(landmarks, rule=(rule, STEP_RULES), norm=(norm, NORMS))
    with no_autocast(landmarks):
        a = gaussian_gram(landmarks.to(compute_dtype(landmarks)))
        if rule == "released" and normalize:
            alpha, cubic = step_size(a.flatten(0, 1)[None], guarded=True)
            cubic = torch.zeros_like(cubic)
        else:
            alpha, cubic = step_size(a, guarded=normalize)
        if not normalize:
            a = a + RIDGE_SOFT * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        exact = a.double()
        scale = _norm(exact, "2")
        iterates = islice(newton_iterates(a, alpha, cubic), steps + 1)
        errors = torch.stack([_norm(exact @ x.double() @ exact - exact, norm) for x in iterates])
    return (errors / scale).nan_to_num(nan=torch.inf, posinf=torch.inf)


@torch.no_grad()
def spectrum(landmarks: Tensor) -> Tensor:
    """Eigenvalues of ``A``, ascending: ``[B, heads, m, d] -> [B, heads, m]``, float64."""
    _check(landmarks)
    return torch.linalg.eigvalsh(gaussian_gram(landmarks.double()))


@torch.no_grad()
def inverse_filter(
    landmarks: Tensor,
    eigenvalues: Tensor,
    *,
    normalize: bool = True,
    solver: str = "newton",
    steps: int = 20,
) -> Tensor:
    """The spectral filter of the inverse: ``g`` with ``A^+ = g(A)``, in float64.

    Args:
        landmarks: ``[B, heads, m, d]``, which decide the step size, or the regularization.
        eigenvalues: of ``A``, where ``g`` is wanted: ``[n]``.
        normalize: see :func:`mmsoft.ops.softmax_free_attention`.
        solver: ``'newton'`` or ``'direct'``.
        steps: Newton-Raphson steps.

    Returns:
        ``[B, heads, n]``.

    Raises:
        ValueError: an argument is invalid.
    """
    _check(landmarks, solver=(solver, SOLVERS))
    a = gaussian_gram(landmarks.double())
    x = eigenvalues.to(a).expand(*a.shape[:2], -1)
    if solver == "direct":
        mu = TIKHONOV * a.sum(-1).amax(-1)[..., None]
        return x / (x.square() + mu.square())
    alpha, cubic = step_size(a, guarded=normalize)
    if not normalize:
        x = x + RIDGE_SOFT
    # The iteration acts on each eigenvalue separately, as on a 1 x 1 matrix.
    pinv = newton_raphson_pinv(x[..., None, None], alpha[..., None], cubic[..., None], steps)
    return pinv[..., 0, 0]


@torch.no_grad()
def landmark_regions(q: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """Which landmark explains which token: the argmax over landmarks of ``K1``, and its value.

    Computed from distances, because far from every landmark ``K1`` is 0 in any dtype.

    Args:
        q: ``[B, heads, N, d]``.
        landmarks: ``[B, heads, m, d]``.

    Returns:
        Numbers of landmarks ``[B, heads, N]`` (int64) and ``exp(-||q - l||^2 / 2)`` of the nearest
        ``[B, heads, N]``, float64 in [0, 1]: how well it explains the token.
    """
    _check(landmarks)
    if q.dim() != 4 or q.shape[:2] != landmarks.shape[:2] or q.shape[3] != landmarks.shape[3]:
        raise ValueError(
            f"q must be [B, heads, N, d] like landmarks {tuple(landmarks.shape)}, "
            f"got shape {tuple(q.shape)}"
        )
    landmarks = landmarks.double()
    nearest = [
        torch.cdist(block.double(), landmarks).min(-1) for block in q.split(_TOKENS_AT_ONCE, 2)
    ]
    distance = torch.cat([found.values for found in nearest], -1)
    return torch.cat([found.indices for found in nearest], -1), (-0.5 * distance.square()).exp()
