"""``softmax_free_attention``: the operator as published."""

import torch
from torch import Tensor

from .checks import check_mask, check_solver, check_tokens
from .gaussian import gaussian_gram, leave_out, unit_of
from .gaussian.pair import PAIR
from .inverse import (
    RIDGE_SOFT,
    guarded_newton_pinv,
    newton_raphson_pinv,
    step_size,
    tikhonov_pinv_product,
)
from .island import compute_dtype, matmul, no_autocast
from .mode import transformed


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
    r"""SOFT and SOFT++ attention (arXiv 2110.11945, equation 8; arXiv 2207.03341, equation 14).

    .. math::
        c\, K\, D^{-1/2} A^\dagger D^{-1/2} K^\top v, \quad
        K = e^{-\|q_i - l_j\|^2 / 2},\ A = e^{-\|l_i - l_j\|^2 / 2},\ D = \mathrm{diag}(A 1)

    Keys equal queries. Linear in ``N``: of ``[N, m]`` matrices no more is stored than blocks, of
    2 MiB on a CPU and 128 MiB on a GPU in float32; Triton's kernels store none. The arithmetic runs
    in float32 (float64 for float64 arguments) whatever autocast says.

    Args:
        q: queries ``[B, heads, N, d]``, already divided by ``d^(1/4)``.
        v: values ``[B, heads, N, d_v]``, dtype of ``q``.
        landmarks: ``[B, heads, m, d]``, dtype of ``q`` or float32.
        mask: ``[B, N]``, bool, False for tokens that are padding. The result is that of the tokens
            without them; what they hold, NaN included, changes no bit of it, nor of a gradient.
            Their own outputs and gradients are 0. ``None``: there is no padding.
        landmark_mask: ``[B, m]``, bool, False for landmarks that are left out in the same way, also
            from ``D``.
        normalize: True for SOFT++; False for SOFT, which drops ``D`` and inverts ``A + 0.01 I``.
        solver: ``'newton'``, the paper's iteration, which released weights need; ``'direct'``, a
            regularized solve that is faster and as stable, for training from scratch. See
            :mod:`mmsoft.ops.inverse`.
        steps: Newton-Raphson steps, 20 in the release; ``'direct'`` has none.
        scale: the factor ``c``, which costs nothing here: it multiplies ``m`` rows, not ``N``.

    Returns:
        ``[B, heads, N, d_v]`` in the dtype of ``v``. Its memory runs ``[B, N, heads, d_v]``, so
        that ``out.transpose(1, 2).flatten(2)`` copies nothing.

        Finite wherever the exact result is in the range of that dtype, though sums of ``v`` on the
        way to it be not; beyond it infinite, but 65504 in float16. The same holds for gradients,
        with a cotangent and a ``scale`` of moderate size. Differentiable once; in forward mode and
        under ``torch.func``, which store ``K``, any number of times.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not match.
        ValueError: ranks, batch, heads, tokens, head dimension or device disagree, or ``solver`` or
            ``steps`` is unknown.
    """
    check_tokens(q, v, landmarks)
    check_mask("mask", mask, q)
    check_mask("landmark_mask", landmark_mask, landmarks)
    check_solver(solver, steps)
    if mask is not None:
        mask = mask[:, None, :, None]
        q, v = leave_out(q, mask), v.masked_fill(~mask, 0)
    with no_autocast(q):
        landmarks = landmarks.to(compute_dtype(q, landmarks))
        unit = unit_of(v, landmarks.dtype)
        present = None
        if landmark_mask is not None:
            landmarks = leave_out(landmarks, landmark_mask[:, None, :, None])
            present = landmark_mask[:, None].expand(landmarks.shape[:3])
        if landmarks.requires_grad and not transformed():  # their gradient, see product_in_units
            landmarks = landmarks.detach() + unit * (landmarks - landmarks.detach())
        a = gaussian_gram(landmarks, present)
        kernel = PAIR(q, landmarks, unit)
        s = kernel.gather(v)  # K^T v: [B, heads, m, d_v]
        root = a.sum(-1, keepdim=True).rsqrt() if normalize else None
        if present is not None:
            there = present[..., None].to(a.dtype)
            root = there if root is None else root * there
        if root is not None:
            s = root * s
        if solver == "direct":
            s = tikhonov_pinv_product(a, s)
        elif normalize:
            s = matmul(guarded_newton_pinv(a, steps), s)
        else:
            alpha, cubic = step_size(a, guarded=False)
            a = a + RIDGE_SOFT * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            s = matmul(newton_raphson_pinv(a, alpha, cubic, steps), s)
        s = scale * s if root is None else scale * root * s
        out = kernel.spread(s)
        if mask is not None:
            out = torch.where(mask, out, 0)  # unlike masked_fill, keeps the memory's order
    if v.dtype == torch.float16:  # the only dtype of smaller range than the arithmetic
        out = out.clamp(-65504, 65504)
    return out.to(v.dtype)
