"""The definitions of SOFT and SOFT++ attention, naive and dtype-agnostic: the oracle of every test.

Nothing here is fast and everything is materialised. Run it in float64 for the truth, or in a lower
precision to learn what plain PyTorch would lose there. Sources: SOFT (arXiv 2110.11945, section 3)
and SOFT++ (arXiv 2207.03341, section 3), with the step rules of the authors' release.
"""

from typing import Any

import torch
from torch import Tensor

from .inverse import RIDGE_SOFT, TIKHONOV


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``exp(-||x_i - y_j||^2 / 2)``: ``[..., n, d], [..., m, d] -> [..., n, m]``."""
    squared = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return torch.exp(-0.5 * (squared - 2 * x @ y.mT).clamp(min=0))


def step_size_soft(a: Tensor) -> Tensor:
    """SOFT's step size of each matrix of ``a [..., m, m]``: ``1.8 / (largest row sum)^2``."""
    return 1.8 / a.sum(-1).amax(-1)[..., None, None].square()


def step_size_softplusplus(a: Tensor) -> Tensor:
    """SOFT++'s guarded step size, one per sample of ``a [B, heads, m, m]``: ``[B, 1, 1, 1]``."""
    alphas = []
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for sample in a:
        alpha = 2 / sample.sum(-1).max() ** 2
        for _ in range(10):
            if (eye - sample @ (alpha * sample)).abs().sum(-2).max() <= 1.01:
                break
            alpha = alpha / 2
        alphas.append(alpha)
    return torch.stack(alphas)[:, None, None, None] if alphas else a.new_empty(0, 1, 1, 1)


def newton_raphson(a: Tensor, alpha: Tensor, steps: int) -> Tensor:
    """``V <- 2V - V A V`` from ``V = alpha A`` (SOFT, equation 9), differentiable by unrolling."""
    v = alpha * a
    for _ in range(steps):
        v = 2 * v - v @ a @ v
    return v


def with_theoretical_gradient(a: Tensor, pinv: Tensor) -> Tensor:
    """The value of ``pinv`` with the gradient ``-V^T (dL/dV) V^T`` with respect to ``a``."""
    pinv = pinv.detach()
    return pinv - pinv @ (a - a.detach()) @ pinv


def newton_filter(a: Tensor, alpha: Tensor, steps: int) -> Tensor:
    """What ``newton_raphson`` computes, through an eigendecomposition.

    The iterates commute with ``a``, so the result is ``g(a)`` with
    ``g(x) = (1 - (1 - alpha x^2)^(2^steps)) / x``.
    """
    eigenvalues, vectors = torch.linalg.eigh(a)
    x = eigenvalues.abs().clamp(min=torch.finfo(a.dtype).tiny) * torch.where(eigenvalues < 0, -1, 1)
    # log1p and expm1 keep the small eigenvalues, for which 1 - (1 - t)^n cancels.
    decay = torch.log1p(-(alpha.squeeze(-1) * x.square()).clamp(max=1)) * 2.0**steps
    return (vectors * (-torch.expm1(decay) / x)[..., None, :]) @ vectors.mT


def tikhonov_filter(a: Tensor) -> Tensor:
    """The direct solver's ``g(x) = x / (x^2 + mu^2)``, ``mu`` = 0.01 times the largest row sum."""
    mu = TIKHONOV * a.sum(-1).amax(-1)[..., None]
    eigenvalues, vectors = torch.linalg.eigh(a)
    g = eigenvalues / (eigenvalues.square() + mu.square())
    return (vectors * g[..., None, :]) @ vectors.mT


def softmax_free_attention(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    normalize: bool = True,
    solver: str = "newton",
    steps: int = 20,
) -> Tensor:
    """:func:`mmsoft.ops.softmax_free_attention` by the book, ``[N, m]`` and all."""
    kernel = gaussian_kernel(q, landmarks)
    a = gaussian_kernel(landmarks, landmarks)
    if solver == "direct":
        mu = TIKHONOV * a.detach().sum(-1).amax(-1)[..., None, None]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        pinv = torch.linalg.inv(a @ a + mu.square() * eye) @ a
    elif normalize:
        alpha = step_size_softplusplus(a.detach())
        pinv = with_theoretical_gradient(a, newton_raphson(a.detach(), alpha, steps))
    else:
        alpha = step_size_soft(a.detach())
        ridged = a + RIDGE_SOFT * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        pinv = with_theoretical_gradient(ridged, newton_raphson(ridged.detach(), alpha, steps))
    if normalize:
        scale = a.sum(-1).rsqrt()
        pinv = scale[..., :, None] * pinv * scale[..., None, :]
    return kernel @ (pinv @ (kernel.mT @ v))


def attention_matrix(q: Tensor, landmarks: Tensor, **kwargs: Any) -> Tensor:
    """The full ``[..., N, N]`` attention matrix: the operator applied to the identity."""
    n = q.shape[-2]
    eye = torch.eye(n, dtype=q.dtype, device=q.device).expand(*q.shape[:-2], n, n)
    return softmax_free_attention(q, eye, landmarks, **kwargs)
