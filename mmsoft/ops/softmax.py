"""Attention whose weights are a softmax: PyTorch's fused one, and the one through landmarks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_mask, check_present, check_tokens
from .gaussian import leave_out
from .island import no_autocast
from .library import TORCH, cpu_autocast_dtype
from .mask import TokenMask, all_if_none
from .mode import forward_mode, lacks_batch_rule, may_decide, recorded

# Their products and sums are within float32's range.
QUERY_MAX, VALUE_MAX = 1e17, 1e30
_IN_FLOAT64 = {QUERY_MAX: 1e100, VALUE_MAX: 1e300}
# On a CPU fused attention stored products in float16 itself, which overflow: NaN.
_OVERFLOWS = TORCH < (2, 6)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """``softmax(scale q k^T + bias) v``, fused unless that lacks tangents, FLOPs or batch rule.

    Args:
        q: queries ``[B, heads, n, d]``.
        k: keys ``[B, heads, N, d]``.
        v: values ``[B, heads, N, d_v]``.
        bias: broadcasts to ``[B, heads, n, N]``.
        scale: of the products.
    """
    if torch.jit.is_tracing() or forward_mode() or lacks_batch_rule():  # get_flops traces
        logits = (q * scale) @ k.mT
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    if _OVERFLOWS and q.device.type == "cpu" and _dtype(q) == torch.float16:
        q, k, v = (t.to(torch.float16).float() for t in (q, k, v))
        bias = None if bias is None else bias.float()
        with no_autocast(q):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return out.to(torch.float16)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _dtype(q: Tensor) -> torch.dtype:
    """In which fused attention would compute."""
    return cpu_autocast_dtype() or q.dtype


def landmark_attention(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    present: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Gaussian kernel attention through landmarks, its rows normalized, its keys weighted.

    .. math::
        \tilde K(q - \bar q, l - \bar q)\, \tilde K(l, k)\, v, \quad
        \tilde K(x, y)_{ij} \propto e^{-\|x_i - y_j\|^2 / 2}\, e^{\|y_j\|^2 / 2},
        \quad \tilde K 1 = 1

    Keys ``k`` equal queries, of which ``\bar q`` is the mean over the tokens. Each landmark carries
    a mean of the values of the tokens that it resembles, each token a mean of its landmarks': no
    inverse, and no output beyond the values' range. The kernel times the weight is ``e^{x_i y_j}``
    up to a factor that rows lose, so fused softmax attention computes both. Why keys are weighted,
    and why tokens read relative to their mean: ``docs/method.md``.

    Args:
        q: queries ``[B, heads, N, d]``, already divided by ``d^(1/4)``.
        v: values ``[B, heads, N, d_v]``, dtype of ``q``.
        landmarks: ``[B, heads, m, d]``, dtype of ``q`` or float32.
        present: ``[B, heads, m]``, bool, from :func:`choose_landmarks`: which landmarks there are,
            at least one for each head that has tokens; ``None`` for all.
        mask: ``[B, N]``, bool, False for tokens that are padding. What they hold changes no bit of
            the others' results and gradients; their own are 0. ``None``: there is no padding.

    Returns:
        ``[B, heads, N, d_v]`` in the dtype of ``v``, or of autocast. Finite: coordinates count as
        at most 1e17, values as at most 1e30 (1e100 and 1e300 in float64). Linear in ``N``.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes or devices disagree.
    """
    check_tokens(q, v, landmarks)
    check_present(landmarks, present)
    check_mask("mask", mask, q)
    present = None if present is None else all_if_none(present)
    if mask is None:
        return attend_landmarks(q, v, landmarks, present)
    there, kept = mask[:, None, :, None], TokenMask(all_if_none(mask))
    q, v = leave_out(q, there), v.masked_fill(~there, 0)
    return torch.where(there, attend_landmarks(q, v, landmarks, present, kept), 0)


def attend_landmarks(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    present: Tensor | None = None,
    mask: TokenMask | None = None,
) -> Tensor:
    """:func:`landmark_attention` of layers, where each head has a landmark and padding is finite.

    What it holds changes no bit of the others' results; its own mean nothing.
    """
    check_tokens(q, v, landmarks)
    check_present(landmarks, present)
    q = _bounded(q, QUERY_MAX)
    return _read(q, _means(q, v, landmarks, present, mask))


class LandmarkMeans(NamedTuple):
    """What tokens read from landmarks: the first half of :func:`landmark_attention`."""

    landmarks: Tensor  # [B, heads, m, d]
    values: Tensor  # means of the tokens' values, [B, heads, m, d_v]
    centre: Tensor  # mean of the queries, [B, heads, 1, d]
    absent: Tensor | None  # added to the logits, [B, heads, 1, m]

    def of(self, sample: int) -> "LandmarkMeans":
        """Those of one sample of the batch."""
        of = slice(sample, sample + 1)
        absent = None if self.absent is None else self.absent[of]
        return LandmarkMeans(self.landmarks[of], self.values[of], self.centre[of], absent)


def landmark_means(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    present: Tensor | None = None,
    mask: TokenMask | None = None,
) -> LandmarkMeans:
    """What :func:`attend_landmarks` takes from all tokens; arguments and errors are its."""
    check_tokens(q, v, landmarks)
    check_present(landmarks, present)
    return _means(_bounded(q, QUERY_MAX), v, landmarks, present, mask)


def _means(
    q: Tensor, v: Tensor, landmarks: Tensor, present: Tensor | None, mask: TokenMask | None
) -> LandmarkMeans:
    padding = absent = None
    if mask is not None:
        padding = mask.bias(q.dtype)
        if not recorded(q):  # fused attention wants it whole, a program would store it
            padding = padding.expand(-1, q.shape[1], landmarks.shape[2], -1)
    if present is not None:
        absent = present.to(q.dtype).log()[:, :, None]
    landmarks = _bounded(landmarks.to(q.dtype), QUERY_MAX)
    values = softmax_attention(landmarks, q, _bounded(v, VALUE_MAX), padding)
    return LandmarkMeans(landmarks, values, _mean(q, mask), absent)


def read_landmarks(q: Tensor, means: LandmarkMeans) -> Tensor:
    """The second half of :func:`landmark_attention`, in which each token is by itself.

    Args:
        q: queries ``[B, heads, n, d]``, any of those that the means were taken of.
        means: from :func:`landmark_means`.

    Returns:
        ``[B, heads, n, d_v]``.
    """
    return _read(_bounded(q, QUERY_MAX), means)


def _read(q: Tensor, means: LandmarkMeans) -> Tensor:
    absent = means.absent
    if absent is not None and not recorded(q):
        absent = absent.expand(-1, -1, q.shape[2], -1)
    relative = q - means.centre
    if q.dtype == torch.float16:
        most = torch.finfo(q.dtype).max
        relative = relative.clamp(-most, most)
    return softmax_attention(relative, means.landmarks, means.values, absent)


def _bounded(t: Tensor, limit: float) -> Tensor:
    """Clamped, without a copy where a look at the values shows that nothing has to be."""
    if t.dtype == torch.float16:  # which has no number as large
        return t
    if t.dtype == torch.float64:
        limit = _IN_FLOAT64[limit]
    dense = t.transpose(1, 2)  # of a layer's tokens
    if may_decide(t) and dense.is_contiguous() and t.numel() > 0:
        low, high = torch.aminmax(dense.detach())
        if -limit <= low and high <= limit:
            return t
    return F.hardtanh(t, -limit, limit)  # whose backward pass is one operation, not five


def _mean(q: Tensor, mask: TokenMask | None) -> Tensor:
    """Over the tokens that there are. Landmarks need not be moved likewise: a row would lose it."""
    if mask is None:
        return q.mean(2, keepdim=True)
    mean = mask.mean(q.transpose(1, 2).flatten(2))  # a view of a layer's tokens
    return mean.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2).to(q.dtype)
