"""Checks of arguments: what is wrong, by name, and what was expected."""

import torch
from torch import Tensor

SOLVERS = ("newton", "direct")


def check_tokens(q: Tensor, v: Tensor, landmarks: Tensor) -> None:
    """Of the attention operators."""
    for name, tensor in (("q", q), ("v", v), ("landmarks", landmarks)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, heads, tokens, d], "
                f"got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have the batch and heads of q, {tuple(q.shape[:2])}, "
                f"got {tuple(tensor.shape[:2])}"
            )
    if v.dtype != q.dtype:
        raise TypeError(f"v must have the dtype of q, {q.dtype}, got {v.dtype}")
    # Under autocast LayerNorm hands float32 landmarks to a half-precision q.
    if landmarks.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"landmarks must be {q.dtype} (as q) or float32, got {landmarks.dtype}")
    if v.shape[2] != q.shape[2]:
        raise ValueError(f"v must have the {q.shape[2]} tokens of q, got {v.shape[2]}")
    if landmarks.shape[3] != q.shape[3]:
        raise ValueError(
            f"landmarks must have the head dimension of q, {q.shape[3]}, got {landmarks.shape[3]}"
        )
    for name, tensor in (("q", q), ("v", v), ("landmarks", landmarks)):
        if tensor.shape[1] < 1 or tensor.shape[2] < 1 or tensor.shape[3] < 1:
            raise ValueError(
                f"{name} must have at least one token, head and channel, "
                f"got shape {tuple(tensor.shape)}"
            )


def check_present(landmarks: Tensor, present: Tensor | None) -> None:
    """Of :func:`mmsoft.ops.landmark_attention`."""
    if present is not None and (
        present.shape != landmarks.shape[:3] or present.dtype != torch.bool
    ):
        raise ValueError(
            f"present must be bool of shape {tuple(landmarks.shape[:3])}, as landmarks, "
            f"got {present.dtype} of shape {tuple(present.shape)}"
        )


def check_solver(solver: str, steps: int) -> None:
    """Of :func:`mmsoft.ops.softmax_free_attention`."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Raise unless ``mask`` is a bool tensor ``[B, n]`` for ``tokens [B, heads, n, d]``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True for what is not padding, got {kind}")
    shape = (tokens.shape[0], tokens.shape[2])
    if mask.shape != shape or mask.device != tokens.device:
        raise ValueError(
            f"{name} must be of shape {tuple(shape)} on {tokens.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def check_choice(
    candidates: Tensor, budget: int, tolerance: float, mask: Tensor | None = None
) -> None:
    """Of :func:`mmsoft.ops.choose_landmarks`."""
    if not isinstance(candidates, Tensor) or not candidates.is_floating_point():
        raise TypeError("candidates must be a floating-point tensor")
    # Each by itself: torch 2.1 compiles no search among sizes that it has made variables of.
    if candidates.dim() != 4 or not all(candidates.shape[dim] > 0 for dim in (1, 2, 3)):
        raise ValueError(
            f"candidates must be [B, heads, M, d], none of the last three 0, "
            f"got shape {tuple(candidates.shape)}"
        )
    if not isinstance(budget, (int, torch.SymInt)) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget must be a positive integer, got {budget!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance!r}")
    check_mask("mask", mask, candidates)


def check_patches(
    q: Tensor,
    hw_shape: tuple[int, int],
    num_heads: int,
    stride: int,
    max_landmarks: int | None,
    index: Tensor | None,
) -> None:
    """Of :func:`mmsoft.ops.landmark_patches`."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    ints = (int, torch.SymInt)
    if (
        not isinstance(hw_shape, (tuple, list))
        or len(hw_shape) != 2
        or not all(isinstance(side, ints) and side > 0 for side in hw_shape)
    ):
        raise ValueError(f"hw_shape must be two positive integers (H, W), got {hw_shape!r}")
    budget = 1 if max_landmarks is None else max_landmarks
    for name, value in (("num_heads", num_heads), ("stride", stride), ("max_landmarks", budget)):
        if not isinstance(value, ints) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if q.dim() != 3 or q.shape[1] != hw_shape[0] * hw_shape[1]:
        raise ValueError(
            f"q must be [B, H*W, C] with H*W = {hw_shape[0]}*{hw_shape[1]} tokens, "
            f"got shape {tuple(q.shape)}"
        )
    if q.shape[2] % num_heads:
        raise ValueError(f"q must have channels for {num_heads} heads, got {q.shape[2]}")
    if index is not None and (index.dtype != torch.int64 or index.dim() != 3):
        raise ValueError(
            f"index must be [B, heads, m] of int64, got shape {tuple(index.shape)} of {index.dtype}"
        )
    if index is not None and index.shape[:2] != (q.shape[0], num_heads):
        raise ValueError(
            f"index must have the batch and heads of q, {(q.shape[0], num_heads)}, "
            f"got {tuple(index.shape[:2])}"
        )
