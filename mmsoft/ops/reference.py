"""The definitions of SOFT and SOFT++ attention, naive and dtype-agnostic: the oracle of every test.

Nothing here is fast and everything is materialized. Run it in float64 for the truth, or in a lower
precision to learn what plain PyTorch would lose there. Sources: SOFT (arXiv 2110.11945, section 3)
and SOFT++ (arXiv 2207.03341, section 3), with the step rules of the authors' release.
"""

from itertools import product
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


def step_size_softplusplus(a: Tensor) -> tuple[Tensor, Tensor]:
    """SOFT++'s guarded step size of each sample of ``a [B, heads, m, m]``.

    Returns:
        ``alpha [B, 1, 1, 1]`` and how many steps to add to the nominal number, 0 or 1: where the
        guard accepts at once we halve all the same and take one step more, because the release's
        start diverges for an eigenvalue ``l`` with ``alpha l^2 = 2``.
    """
    alphas, extra = [], []
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for sample in a:
        alpha, halvings = 2 / sample.sum(-1).max() ** 2, 0
        while halvings < 10 and (eye - sample @ (alpha * sample)).abs().sum(-2).max() > 1.01:
            alpha, halvings = alpha / 2, halvings + 1
        alphas.append(alpha / 2 if halvings == 0 else alpha)
        extra.append(int(halvings == 0))
    shape = (len(a), 1, 1, 1)
    return a.new_tensor(alphas).view(shape), torch.tensor(extra, device=a.device).view(shape)


def newton_raphson(a: Tensor, alpha: Tensor, steps: int | Tensor) -> Tensor:
    """``X <- 2X - X A X`` from ``X_0 = alpha A`` (SOFT, equation 9), unrolled by autograd."""
    x = alpha * a
    steps = torch.as_tensor(steps, device=a.device)
    for k in range(int(steps.max()) if steps.numel() else 0):
        x = torch.where(k < steps, 2 * x - x @ a @ x, x)
    return x


def with_theoretical_gradient(a: Tensor, pinv: Tensor) -> Tensor:
    """The value of ``pinv`` with the gradient ``-X^T (dL/dX) X^T`` with respect to ``a``."""
    pinv = pinv.detach()
    return pinv - pinv @ (a - a.detach()) @ pinv


def newton_filter(a: Tensor, alpha: Tensor, steps: int | Tensor) -> Tensor:
    """What ``newton_raphson`` computes, ``g(l) = (1 - (1 - alpha l^2)^(2^steps)) / l``.

    Through an eigendecomposition, with ``l`` the eigenvalues.
    """
    eigenvalues, vectors = torch.linalg.eigh(a)
    tiny = torch.finfo(a.dtype).tiny
    safe = torch.where(eigenvalues < 0, -1, 1) * eigenvalues.abs().clamp(min=tiny)
    # log1p and expm1 keep the small eigenvalues, for which 1 - (1 - t)^n cancels; (1 - t)^n with
    # its even n is (t - 1)^n for the large ones.
    t = alpha.squeeze(-1) * safe.square()
    t = torch.where(t > 1, 2 - t, t)
    decay = torch.log1p(-t) * 2.0 ** torch.as_tensor(steps, device=a.device).reshape(-1, 1, 1)
    return (vectors * (-torch.expm1(decay) / safe)[..., None, :]) @ vectors.mT


def tikhonov_filter(a: Tensor) -> Tensor:
    """The direct solver's ``g(l) = l / (l^2 + mu^2)``, ``mu`` = 0.01 times the largest row sum."""
    mu = TIKHONOV * a.sum(-1).amax(-1)[..., None]
    eigenvalues, vectors = torch.linalg.eigh(a)
    g = eigenvalues / (eigenvalues.square() + mu.square())
    return (vectors * g[..., None, :]) @ vectors.mT


def choose_landmarks(
    candidates: Tensor, budget: int, *, tolerance: float = 0.1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`mmsoft.ops.choose_landmarks`, each residual from the whole Gram matrix."""
    batch, heads, total, _ = candidates.shape
    kept = min(total, budget)
    device = candidates.device
    index = torch.zeros(batch, heads, kept, dtype=torch.long, device=device)
    present = torch.zeros(batch, heads, kept, dtype=torch.bool, device=device)
    everything = torch.arange(total, device=device)
    for b, h in product(range(batch), range(heads)):
        numbers = everything if mask is None else mask[b].nonzero()[:, 0]
        if len(numbers) == 0:
            continue
        points = candidates[b, h, numbers]
        gram = gaussian_kernel(points, points)
        score = -(points - points.mean(0)).square().sum(-1)
        chosen: list[int] = []
        residual = gram.diagonal()
        while len(chosen) < min(kept, len(points)) and residual.max() > tolerance:
            score[chosen] = -torch.inf
            chosen.append(int(score.argmax()))
            explained = torch.linalg.solve(gram[chosen][:, chosen], gram[chosen])
            score = residual = 1 - (gram[chosen] * explained).sum(0)
        index[b, h, : len(chosen)] = numbers[chosen]
        present[b, h, : len(chosen)] = True
    return index, present


def salient_mean(patches: Tensor, centre: Tensor, valid: Tensor | None = None) -> Tensor:
    """:func:`mmsoft.ops.salient_mean`, token by token."""
    distances = (patches - centre[:, None, :, None]).detach().square().sum(-1, keepdim=True)
    weights = distances.clamp(min=1e-12)
    if valid is not None:
        weights = torch.where(valid[..., None], weights, 0)
    mean = (weights * patches).sum(-2) / weights.sum(-2)
    return torch.where(weights.sum(-2) > 0, mean, 0)


def softmax_free_attention(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    mask: Tensor | None = None,
    landmark_mask: Tensor | None = None,
    normalize: bool = True,
    solver: str = "newton",
    steps: int = 20,
    scale: float = 1.0,
) -> Tensor:
    """:func:`mmsoft.ops.softmax_free_attention` as defined, with ``[N, m]`` stored.

    Padding is cut off, sample by sample, before anything is computed; its outputs are 0.
    """
    if mask is not None or landmark_mask is not None:
        options: dict[str, Any] = dict(normalize=normalize, solver=solver, steps=steps, scale=scale)
        out = torch.zeros_like(v)
        for b in range(len(q)):
            everything = torch.arange(q.shape[2], device=q.device)
            tokens = everything if mask is None else mask[b].nonzero()[:, 0]
            kept = slice(None) if landmark_mask is None else landmark_mask[b]
            if len(tokens) and landmarks[b, :, kept].shape[1]:
                result = softmax_free_attention(
                    q[b, None, :, tokens],
                    v[b, None, :, tokens],
                    landmarks[b, None, :, kept],
                    **options,
                )
                heads = torch.arange(q.shape[1], device=q.device)[:, None]
                out = out.index_put((torch.full_like(heads, b), heads, tokens), result[0])
        return out
    kernel = gaussian_kernel(q, landmarks)
    a = gaussian_kernel(landmarks, landmarks)
    if solver == "direct":
        mu = TIKHONOV * a.detach().sum(-1).amax(-1)[..., None, None]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        pinv = torch.linalg.inv(a @ a + mu.square() * eye) @ a
    elif normalize:
        alpha, extra = step_size_softplusplus(a.detach())
        pinv = with_theoretical_gradient(a, newton_raphson(a.detach(), alpha, steps + extra))
    else:
        alpha = step_size_soft(a.detach())
        ridged = a + RIDGE_SOFT * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        pinv = with_theoretical_gradient(ridged, newton_raphson(ridged.detach(), alpha, steps))
    if normalize:
        root = a.sum(-1).rsqrt()
        pinv = root[..., :, None] * pinv * root[..., None, :]
    return scale * kernel @ (pinv @ (kernel.mT @ v))


def landmark_attention(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    present: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`mmsoft.ops.landmark_attention` as defined: kernels, weights, row sums."""
    if present is None:
        present = torch.ones_like(landmarks[..., 0], dtype=torch.bool)
    if mask is not None:
        out = torch.zeros_like(v)
        for b, tokens in enumerate(mask):
            if tokens.any():
                queries, values = (t[b, None][:, :, tokens] for t in (q, v))
                result = landmark_attention(queries, values, landmarks[b, None], present[b, None])
                heads = torch.arange(q.shape[1], device=q.device)[:, None]
                where = (torch.full_like(heads, b), heads, tokens.nonzero()[:, 0])
                out = out.index_put(where, result[0])
        return out

    def normalized(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
        exponent = -(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2
        exponent = exponent + y.square().sum(-1)[..., None, :] / 2
        exponent = exponent.masked_fill(~there[..., None, :], -torch.inf)
        weights = (exponent - exponent.detach().amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)

    every, mean = torch.ones_like(q[..., 0], dtype=torch.bool), q.mean(-2, keepdim=True)
    means = normalized(landmarks, q, every) @ v
    return normalized(q - mean, landmarks - mean, present) @ means


def attention_matrix(q: Tensor, landmarks: Tensor, **kwargs: Any) -> Tensor:
    """The full ``[..., N, N]`` attention matrix: the operator applied to the identity."""
    n = q.shape[-2]
    eye = torch.eye(n, dtype=q.dtype, device=q.device).expand(*q.shape[:-2], n, n)
    return softmax_free_attention(q, eye, landmarks, **kwargs)
