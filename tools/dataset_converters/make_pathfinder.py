"""Write the Pathfinder data of the Long Range Arena (32x32), which are made by a program.

    python tools/dataset_converters/make_pathfinder.py data/pathfinder32

Each picture has two contours of 14 dashes and 5 distractors of 4. Two discs are at both ends of one
contour (joined), or at the beginning of one and the end of the other (apart); one half is joined.
Dashes are 2 pixels long with a gap of 1; from one to the next the direction turns by x with a
probability that goes like cos(x)^2, and never into the margin of 1 pixel around dashes and
border. Contours begin 7 pixels from each other, in the middle. 160000 pictures are for training,
20000 for validation, 20000 for the test.

    OUT/pathfinder32_{train,val,test}.npz      images, uint8 [n, 32, 32], and labels, uint8 [n]

The folder gets its name when it is complete; a complete one with the same parameters is kept.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from mmsoft.conversion import generate, generator_parser, track, write_once

VERSION = 1  # raise it when the same parameters no longer give the same pictures
SIDE = 32
CONTOUR, DISTRACTOR, DISTRACTORS = 14, 4, 5  # dashes, dashes, contours
LENGTH, MARGIN, PADDING = 2, 1, 1  # of a dash, around it, at the border; in pixels, as the next
SEED_DISTANCE, RADIUS = 7, 1.5  # of the contours' beginnings; of a disc
FINE = 2  # drawn this much finer, where a dash is one pixel thick
CONTRAST = 2 * 0.75  # of a dash, whose pixels are half covered, to a disc, at most 1
BATCH = 512  # pictures at once
TURNS = np.radians(np.arange(-81, 82, 18))  # a pixel apart at the distance of a dash and its gap
CHANCE = np.cos(TURNS) ** 2
# Around a dash nothing may come nearer than both margins and its thickness of half a pixel.
REACH = 5  # of the fine grid
STAMP = np.argwhere(np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]) <= REACH) - REACH
ROOM = REACH + 1  # around the fine grid, for stamps
POINTS = np.linspace(0, LENGTH, 3)[:, None]  # of a dash


class Fields:
    """Which places are taken, on the fine grid of each of ``n`` pictures."""

    def __init__(self, n: int):
        side = FINE * SIDE
        self.taken = np.zeros((n, side + 2 * ROOM, side + 2 * ROOM), bool)  # with room for stamps
        inner = slice(ROOM + FINE * PADDING, ROOM + side - FINE * PADDING)
        self.border = np.ones(self.taken.shape[1:], bool)
        self.border[inner, inner] = False
        self.taken |= self.border

    def free(self, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether all points ``[n, ..., 3, 2]`` of a dash are free in these pictures."""
        at = np.clip(np.floor(FINE * points).astype(int) + ROOM, 0, self.taken.shape[1] - 1)
        rows = rows.reshape(-1, *[1] * (at.ndim - 2))
        return ~self.taken[rows, at[..., 0], at[..., 1]].any(-1)

    def take(self, points: np.ndarray, rows: np.ndarray) -> None:
        """Nothing else may come near these points ``[n, 3, 2]``."""
        at = np.floor(FINE * points).astype(int)[:, :, None] + ROOM + STAMP
        at = np.clip(at, 0, self.taken.shape[1] - 1)
        self.taken[rows[:, None, None], at[..., 0], at[..., 1]] = True


def dash(start: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The points ``[..., 3, 2]`` of dashes that begin at ``start [..., 2]``."""
    direction = np.stack((np.sin(angle), np.cos(angle)), -1)
    return start[..., None, :] + POINTS * direction[..., None, :]


def extend(
    rng: np.random.Generator, field: Fields, rows: np.ndarray, last: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The next dash after ``last [n, 3, 2]``: its points, its angle, and whether there is room."""
    angles = angle[:, None] + TURNS  # [n, K]
    direction = np.stack((np.sin(angles), np.cos(angles)), -1)
    candidates = dash(last[:, None, -1] + MARGIN * direction, angles)  # [n, K, 3, 2]
    chance = CHANCE * field.free(candidates, rows)
    total = chance.cumsum(1)
    chosen = (total < rng.random(len(rows))[:, None] * total[:, -1:]).sum(1)
    chosen = np.minimum(chosen, len(TURNS) - 1)
    every = np.arange(len(rows))
    return candidates[every, chosen], angles[every, chosen], total[:, -1] > 0


def contours(rng: np.random.Generator, n: int) -> tuple[np.ndarray, Fields]:
    """Both contours ``[k, 2, 14, 3, 2]`` of those of ``n`` pictures that have room, and fields."""
    rows = np.arange(n)
    fields = [Fields(n), Fields(n)]  # for each contour all but its own last dash
    first = rng.integers(2 * SEED_DISTANCE, SIDE - 2 * SEED_DISTANCE, (n, 2)) + 0.5
    aside = rng.uniform(0, 2 * np.pi, n)
    second = first + SEED_DISTANCE * np.stack((np.sin(aside), np.cos(aside)), 1)
    starts, angles = [first, second], rng.uniform(-np.pi, np.pi, (2, n))
    dashes = np.zeros((n, 2, CONTOUR, 3, 2))
    whole = np.ones(n, bool)
    for side in (0, 1):
        dashes[:, side, 0] = dash(starts[side], angles[side])
        whole &= fields[side].free(dashes[:, side, 0], rows)
        fields[1 - side].take(dashes[:, side, 0], rows)
    for number in range(1, CONTOUR):
        for side in (0, 1):
            rows = np.flatnonzero(whole)
            last = dashes[rows, side, number - 1]
            new, angle, room = extend(rng, fields[side], rows, last, angles[side, rows])
            whole[rows[~room]] = False
            dashes[rows, side, number], angles[side, rows] = new, angle
            fields[1 - side].take(new, rows)
            fields[side].take(last, rows)
    rows = np.flatnonzero(whole)
    fields[0].taken |= fields[1].taken
    fields[0].taken = fields[0].taken[rows]
    return dashes[rows], fields[0]


def distractors(rng: np.random.Generator, field: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Five in each picture, ``[n, 5, 4, 3, 2]``, and which of them had room, ``[n, 5]``."""
    n = len(field.taken)
    found = np.zeros((n, DISTRACTORS, DISTRACTOR, 3, 2))
    there = np.zeros((n, DISTRACTORS), bool)
    for number in range(DISTRACTORS):
        for _ in range(5):
            rows = np.flatnonzero(~there[:, number])
            own = Fields(0)
            own.taken = field.taken[rows]
            every, angle = np.arange(len(rows)), rng.uniform(-np.pi, np.pi, len(rows))
            last = dash(rng.uniform(PADDING, SIDE - PADDING, (len(rows), 2)), angle)
            whole = own.free(last, every)
            found[rows, number, 0] = last
            for k in range(1, DISTRACTOR):
                new, angle, room = extend(rng, own, every, last, angle)
                whole &= room
                own.take(last, every)
                found[rows, number, k] = last = new
            rows = rows[whole]
            there[rows, number] = True
            for k in range(DISTRACTOR):
                field.take(found[rows, number, k], rows)
    return found, there


def draw(dashes: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """A picture, uint8 ``[32, 32]``, of dashes ``[k, 3, 2]`` and discs ``[2, 2]``."""
    shift = 4  # bits of a fraction of a pixel, which OpenCV centres at whole numbers
    fine = np.zeros((FINE * SIDE, FINE * SIDE), np.uint8)
    ends = np.rint((FINE * dashes[:, [0, 2], ::-1] - 0.5) * (1 << shift)).astype(np.int32)
    for start, end in ends.tolist():
        cv2.line(fine, start, end, 255, 1, cv2.LINE_AA, shift)
    lines = cv2.resize(fine, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(float)
    picture = np.minimum(CONTRAST * lines, 255)
    y, x = np.mgrid[: FINE * SIDE, : FINE * SIDE] + 0.5
    for row, column in FINE * np.rint(discs):
        disc = ((y - row) ** 2 + (x - column) ** 2 <= (FINE * RADIUS) ** 2).astype(np.float32)
        disc = 255 * cv2.resize(disc, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        picture = np.maximum(picture, disc)
    return np.rint(picture * (255 / picture.max())).astype(np.uint8)


def pictures(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    """Pictures and labels without end."""
    while True:
        both, field = contours(rng, BATCH)
        short, there = distractors(rng, field)
        joined, which = rng.integers(0, 2, (2, len(both)))
        for i, label in enumerate(joined.tolist()):
            begin, end = which[i], which[i] if label else 1 - which[i]
            discs = np.stack((both[i, begin, 0, 0], both[i, end, -1, -1]))
            found = (both[i].reshape(-1, 3, 2), short[i, there[i]].reshape(-1, 3, 2))
            dashes = np.concatenate(found)
            yield draw(dashes, discs), label


def write(out: Path, sizes: dict[str, int], seed: int) -> None:
    """Write the files of all splits."""
    for number, (split, size) in enumerate(sizes.items()):
        print(f"{split}: {size}")
        found = pictures(np.random.default_rng([VERSION, seed, number]))
        images, labels = np.zeros((size, SIDE, SIDE), np.uint8), np.zeros(size, np.uint8)
        for i, (image, label) in enumerate(track(islice(found, size), size)):
            images[i], labels[i] = image, label
        np.savez_compressed(out / f"pathfinder32_{split}.npz", images=images, labels=labels)


def main() -> None:
    """Read the command line and write the data set."""
    sizes = dict(train=160000, val=20000, test=20000)
    args = generator_parser(__doc__, sizes, "pictures").parse_args()
    sizes = {split: getattr(args, split) for split in sizes}
    parameters = dict(sizes, version=VERSION, seed=args.seed)

    def fill(folder: Path) -> None:
        write(folder, sizes, args.seed)

    generate(args.out, lambda: write_once(args.out, parameters, fill))


if __name__ == "__main__":
    main()
