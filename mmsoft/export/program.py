"""``torch.export`` of a module from images to tensors, and the file that it gives."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from mmsoft.fileio import write_whole
from mmsoft.models.attention import SoftmaxAttention
from mmsoft.models.padding import inside

from .bodies import PlainTorch

STRIDE = 32  # pixels: one token of stage 4, one landmark in each of the others
LARGEST = 4096  # of a dynamic height and width
TOLERANCE = 1e-4  # of the largest output
OLDEST_TORCH = "2.6"  # that records the backbones


@dataclass(frozen=True)
class Input:
    """The images that a program takes: ``[batch, 3, height, width]``.

    Attributes:
        shape: (height, width) in pixels, of the sample that the program is recorded with.
        batch: images in it.
        dynamic_batch: take any number of images.
        dynamic_size: take any height and width from 64 pixels, or 32 more than the stride of a
            detector's coarsest level, to 4096.
    """

    shape: tuple[int, int] = (224, 224)
    batch: int = 1
    dynamic_batch: bool = False
    dynamic_size: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < STRIDE:
            raise ValueError(f"shape must be at least {STRIDE} pixels a side, got {self.shape}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    def images(self, batch: int, shape: tuple[int, int]) -> Tensor:
        """Smooth random images: of pure noise, every patch is like every other."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(batch, 3, 9, 9, generator=generator)
        images = torch.nn.functional.interpolate(coarse, shape, mode="bicubic")
        return images + 0.1 * torch.randn(images.shape, generator=generator)

    def recorded(self) -> Tensor:
        """The sample. Where it may change, a number unlike any in the model.

        torch takes 1 for a constant, and a size that equals another number for that number: a
        detector recorded at 96 pixels, with 96 channels, held for 96 pixels only (torch 2.13).
        """
        batch = 7 if self.dynamic_batch else self.batch
        shape = self.shape
        if self.dynamic_size:
            shape = (11 * STRIDE + 5, 13 * STRIDE + 9)
        return self.images(batch, shape)

    def checked(self, sizes: "Sizes") -> list[Tensor]:
        """Images of all sizes and numbers for which to compare program and model.

        The last of them have padding.
        """
        shapes = [self.shape]
        if self.dynamic_size:
            height, width = (side + STRIDE for side in self.shape)
            wide = max(width + 2 * STRIDE, sizes.turn + STRIDE)
            shapes.append((sizes.smallest, min(wide, LARGEST)))
            shapes.append((min(height, LARGEST) - 3, sizes.smallest + STRIDE + 5))
        batches = [self.batch, self.batch + 1] if self.dynamic_batch else [self.batch]
        images = [self.images(batch, shape) for batch in batches for shape in shapes]
        return [*images, _fill_up(images[-1])]

    def dims(self, smallest: int) -> dict[int, Any]:
        """For ``torch.export``."""
        dims: dict[int, Any] = {}
        if self.dynamic_batch:
            dims[0] = torch.export.Dim("batch", min=1, max=1024)
        if self.dynamic_size:
            dims[2] = torch.export.Dim("height", min=smallest, max=LARGEST)
            dims[3] = torch.export.Dim("width", min=smallest, max=LARGEST)
        return dims


def _fill_up(images: Tensor) -> Tensor:
    """Images without a quarter of their rows and an eighth of their columns, or vice versa."""
    height, width = images.shape[2:]
    images = images.clone()
    for first, (rows, cols) in enumerate(((4, 8), (8, 4))):
        images[first::2, :, height - height // rows :] = 0
        images[first::2, :, :, width - width // cols :] = 0
    return images


class Sizes(NamedTuple):
    """Of images for which a program of any size holds, in pixels; see :func:`sizes_of`."""

    smallest: int  # side
    turn: int  # the side beyond which ``max_keys`` changes what stage 4 computes; 0 for none


def sizes_of(module: Any) -> Sizes:
    """Below the smallest a level of the features has one row, which torch takes for a constant."""
    layers = [m for m in module.modules() if isinstance(m, SoftmaxAttention)]
    turns = [math.isqrt(layer.max_keys) * STRIDE for layer in layers if layer.max_keys is not None]
    return Sizes(module.coarsest + STRIDE, max(turns, default=0))


@dataclass(frozen=True)
class Difference:
    """By how much a program's output differs from the model's."""

    images: tuple[int, ...]  # shape
    name: str
    shape: tuple[int, ...]
    error: float  # largest absolute difference over the largest absolute value
    padded: bool = False
    found: int = 0  # of detections: by the model
    note: str = ""  # how many, and how many rounding decides


def compare(
    names: list[str], images: Tensor, expected: tuple[Tensor, ...], found: list[Any]
) -> list[Difference]:
    """One :class:`Difference` for each output."""
    result = []
    for name, ours, theirs in zip(names, expected, found, strict=True):
        other = torch.as_tensor(theirs)
        if other.shape != ours.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, the model's {tuple(ours.shape)}"
            )
        scale = ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
        error = float((other - ours).abs().max() / scale)
        error = error if math.isfinite(error) else math.inf
        result.append(Difference(tuple(images.shape), name, tuple(ours.shape), error))
    return result


@torch.no_grad()
def differences_of(
    module: Any, images: Tensor, found: list[Any], tolerance: float
) -> list[Difference]:
    """One :class:`Difference` for each output of a program, by the module's own measure if any.

    Raises:
        ValueError: an output has another shape, or detections are others.
    """
    if hasattr(module, "differences"):
        differences = module.differences(images, found, tolerance)
    else:
        differences = compare(module.names, images, module(images), found)
    padded = inside(images) is not None
    return [replace(difference, padded=padded) for difference in differences]


def refuse(differences: list[Difference], tolerance: float) -> None:
    """Raise ValueError if one of them is too large."""
    worst = max(differences, key=lambda difference: difference.error)
    if not worst.error <= tolerance:
        images = f"{worst.images}{' with padding' if worst.padded else ''}"
        raise ValueError(
            f"the program's {worst.name} differs from the model's by {worst.error:.1e} of its "
            f"largest value for images {images}, more than {tolerance:g}; nothing was written"
        )


@contextmanager
def one_error(module: Any) -> Iterator[None]:
    """Whatever torch raises of a module becomes one ValueError, which names it."""
    try:
        yield
    except Exception as error:
        title = getattr(module, "title", type(module).__name__)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{title} cannot be exported: {type(error).__name__}: {reason[:300]}"
        ) from error


class _Plain(nn.Module):
    """The module, recorded without our custom operators."""

    def __init__(self, module: nn.Module, linear_algebra: bool):
        super().__init__()
        self.module = module
        self.linear_algebra = linear_algebra

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with PlainTorch(self.linear_algebra):
            return self.module(images)


@torch.no_grad()
def record(
    module: nn.Module, inputs: Input, *, linear_algebra: bool
) -> torch.export.ExportedProgram:
    """The program of a module from :func:`exportable`, in plain torch.

    Args:
        module: on the CPU, in evaluation mode.
        inputs: the images.
        linear_algebra: False leaves the inverses and the choice of landmarks as custom operators.

    Raises:
        ImportError: torch is too old.
        ValueError: no program of any size takes images of this one, or none can be recorded.
    """
    if Version(Version(torch.__version__).base_version) < Version(OLDEST_TORCH):
        raise ImportError(
            f"exporting needs torch>={OLDEST_TORCH}, but torch {torch.__version__} is installed"
        )
    smallest = sizes_of(module).smallest
    if inputs.dynamic_size:
        for side in inputs.shape:
            if not smallest <= side <= LARGEST:
                raise ValueError(
                    f"a program of any size takes from {smallest} to {LARGEST} pixels a side, but "
                    f"shape is {inputs.shape}: change it, or fix the size"
                )
    dims = inputs.dims(smallest)
    with one_error(module):
        return torch.export.export(
            _Plain(module, linear_algebra),
            (inputs.recorded(),),
            dynamic_shapes={"images": dims} if dims else None,
            strict=False,
        )


def export_program(
    module: Any, inputs: Input, path: str | os.PathLike, *, tolerance: float = TOLERANCE
) -> list[Difference]:
    """Write a ``torch.export`` program that any process with torch alone can load and run.

    The program is compared with the module in a process that has not imported MMSOFT.

    Args:
        module: from :func:`exportable`, on the CPU.
        inputs: the images.
        path: of the file, ``.pt2``; written whole, or not at all.
        tolerance: how far an output may be from the module's, relative to its largest value.

    Returns:
        How far they are, for each output and several sizes.

    Raises:
        ImportError: torch is older than 2.6.
        ValueError: the program's outputs differ by more, or torch cannot export the module.
    """
    if reason := getattr(module, "onnx_alone", ""):
        raise ValueError(f"{module.title} cannot be exported as a torch.export program: {reason}")
    program = record(module, inputs, linear_algebra=True)
    with one_error(module):
        program = program.run_decompositions({})
    cases = inputs.checked(sizes_of(module))
    with write_whole(path) as partial:
        torch.export.save(program, partial)
        differences = []
        for images, found in zip(cases, run_elsewhere(partial, cases), strict=True):
            differences += differences_of(module, images, found, tolerance)
        refuse(differences, tolerance)
    return differences


def run_elsewhere(program: Path, cases: list[Tensor]) -> list[list[Tensor]]:
    """Outputs of a saved program for each case, from a process without MMSOFT."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "cases.pt"), Path(folder, "outputs.pt")
        torch.save(cases, files[0])
        script = Path(__file__).with_name("standalone.py")
        command = [sys.executable, *map(str, (script, os.path.abspath(program), *files))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the program does not run without mmsoft: {done.stderr[-500:]}")
        return torch.load(files[1])
