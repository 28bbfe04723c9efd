"""Which part of a batch of images is not padding."""

from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from mmsoft.ops.library import larger
from mmsoft.ops.mask import TokenMask, once
from mmsoft.ops.mode import may_decide, traced


class TakesPadding:
    """An attention layer whose methods take what is ``inside`` as their last argument.

    A subclass that overrides one of them without it is not handed it, and so sees padding.
    """

    takes_padding = True
    by_content: bool  # whether it has landmarks to choose

    @property
    def leaves_padding_out(self) -> bool:
        """Whether the result does not depend on it."""
        return self.takes_padding and getattr(self, "by_content", True)

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in ("forward", "attend", "sample_landmarks", "convolve_values"):
            if name in vars(cls):
                parameters = signature(vars(cls)[name]).parameters.values()
                kinds = {parameter.kind for parameter in parameters}
                names = {parameter.name for parameter in parameters}
                if "inside" not in names and Parameter.VAR_POSITIONAL not in kinds:
                    cls.takes_padding = False


class Inside(TokenMask):
    """Of each sample the rows ``[B, H]`` and columns ``[B, W]`` of a grid that are its image's.

    Both are True up to the image's lower and right border, and False beyond; the first is True.
    """

    def __init__(self, rows: Tensor, cols: Tensor):
        self.rows, self.cols = rows, cols
        self._made: dict[Any, Any] = {}

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.rows, self.cols))

    def cropped(self) -> "tuple[Inside | None, tuple[int, int]]":
        """Without rows and columns that are padding of all samples, and how many are left.

        ``None`` where nothing else is padding.
        """
        height, width = (int(along.any(0).sum()) for along in self)
        part = Inside(self.rows[:, :height], self.cols[:, :width])
        return (None if all(along.all() for along in part) else part), (height, width)

    def every(self, step: int) -> "Inside":
        """On the grid of every ``step``-th row and column, for a step of 1, 2, 4, 8, ..."""
        return self if step == 1 else self._halved().every(step // 2)

    @once
    def _halved(self) -> "Inside":
        # Numbers of rows and columns in the words of a convolution of stride 2: torch.export cannot
        # tell that a slice has as many.
        return Inside(*(_select(along, (along.shape[1] - 1) // 2 + 1, 2) for along in self))

    @once
    def tokens(self) -> Tensor:
        """``[B, H*W]``, row by row."""
        return (self.rows[:, :, None] & self.cols[:, None]).flatten(1)

    def outside(self) -> Tensor:
        """What is padding, ``[B, H, W]``."""
        return self.padding().view(-1, self.rows.shape[1], self.cols.shape[1])

    @once
    def patches(self, side: int) -> Tensor:
        """Which patches of ``side x side`` tokens lie inside, ``[B, M]``, row by row.

        Where an image is smaller than a patch, the one that it is part of, too.
        """
        rows, cols = (_whole(along, side) for along in self)
        return (rows[:, :, None] & cols[:, None]).flatten(1)


def inside(images: Tensor) -> Inside | None:
    """The images that a batch ``[B, C, H, W]`` has been filled up around.

    OpenMMLab's preprocessors fill up with 0, at the bottom and on the right, after they have
    normalized: rows and columns from which on everything is exactly 0 are padding. So are, where no
    mean was subtracted, a black border there, and what was filled up with anything else is not. An
    image that is 0 everywhere has no padding.

    Returns:
        ``None`` where a look at the images shows that there is no padding; on a GPU, which a look
        would stop, and in a program that is compiled or exported, never. ``None`` under
        ``torch.jit.trace``, too, with which FLOPs are counted: those of an image alone.
    """
    if torch.jit.is_tracing():
        return None
    with torch.no_grad():
        if may_decide(images):
            last_row, last_col = (images.select(dim, -1) != 0 for dim in (2, 3))
            if bool((last_row.flatten(1).any(1) & last_col.flatten(1).any(1)).all()):
                return None
        largest = images.abs().amax(1)
        return Inside(*(_up_to_the_last(largest.amax(dim) != 0) for dim in (2, 1)))


def _select(along: Tensor, size: Any, step: int, first: int = 0) -> Tensor:
    """All ``size`` entries of ``[B, n]`` at such a distance, the last one where there is none."""
    if not traced(along):
        return along[:, min(first, along.shape[1] - 1) :: step]
    index = torch.arange(size, device=along.device) * step + first
    return along.index_select(1, index.clamp(max=along.shape[1] - 1))


def _up_to_the_last(there: Tensor) -> Tensor:
    """``[B, n]``, True up to the last True; everywhere where there is none."""
    after = there.flip(1).cumsum(1).flip(1) > 0
    return after | ~after[:, :1]


def _whole(along: Tensor, side: int) -> Tensor:
    """Which parts of ``side`` are inside to their end; at least the first one is."""
    count = larger(along.shape[1] // side, 1)
    whole = _select(along, count, side, side - 1)
    if traced(along):  # a program for any size cannot tell whether there are others
        return whole | (torch.arange(count, device=along.device) == 0)
    return torch.cat((along[:, :1], whole[:, 1:]), 1)
