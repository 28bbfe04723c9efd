"""The golden files' weights and inputs, by their recipe, and what they should give."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ARCH = dict(depths=[1, 2, 2, 2], embed_dims=[32, 64, 96, 128], num_heads=[1, 2, 3, 4])
SMALL = dict(ARCH, depths=[1, 1, 1, 1])  # for tests of something else


def shapes() -> dict[str, list[int]]:
    return json.loads((GOLDEN / "mini_keys.json").read_text())


def state_dict(ill_conditioned: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A state dict under the released names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1000)
            continue
        z = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            z = 0.5 + 0.5 * abs(z)
        elif name.endswith("running_mean"):
            z = 0.1 * z
        elif len(shape) == 1 and name.endswith("weight"):
            z = 1 + 0.1 * z
        elif name.endswith("bias"):
            z = 0.05 * z
        elif "pos_embed" in name or "cls_token" in name:
            z = 0.2 * z
        else:
            # In float64, as NumPy 2 does it by itself.
            z = z.astype(np.float64) / np.sqrt(np.prod(shape[1:])) * (1.5 if "W_q" in name else 1)
        z = np.asarray(z, dtype=np.float32)
        if ill_conditioned and name.endswith("Qnorm_act.0.weight"):
            z = z * np.float32(0.3)
        weights[name] = torch.tensor(z)
    return weights


def images(height: int, width: int) -> Tensor:
    rng = np.random.default_rng(7)
    return torch.tensor(rng.standard_normal((2, 3, height, width)).astype(np.float32))


def cotangent() -> Tensor:
    return torch.tensor(np.random.default_rng(5).standard_normal((1, 10)).astype(np.float32))


def outputs(variant: str, condition: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """The recorded arrays of the authors' code."""
    file = np.load(GOLDEN / f"mini_{variant}_{condition}_{size[0]}x{size[1]}.npz")
    return {name: torch.tensor(file[name]) for name in file.files}
