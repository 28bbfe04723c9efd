"""Write the Pathfinder data of the Long Range Arena (32x32), which are made by a program.

    python tools/dataset_converters/make_pathfinder.py data/pathfinder32

Each picture has two contours of 14 dashes and 5 distractors of 4. Two discs are at both ends of one
contour (joined), or at the beginning of one and the end of the other (apart); one half is joined.
Dashes are 2 pixels long, with a margin of 1 around them and inside of the border. From one to the
next it goes straight on for a margin, turns, and on for another one; a turn by x has a probability
that goes like cos(x)^2, and none leads to where a dash is near. Contours begin 7 pixels from each
other, in the middle, and have three quarters of the distractors' brightness. A distractor without
room is left out. 160000 pictures are for training, 20000 for validation, 20000 for the test.

    OUT/pathfinder32_{train,val,test}.npz      images, uint8 [n, 32, 32], and labels, uint8 [n]

The folder gets its name when it is complete; a complete one with the same parameters is kept.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from mmsoft.conversion import generate, generator_parser, track, write_once

VERSION = 2  # raise it when the same parameters no longer give the same pictures
SIDE = 32
CONTOUR, DISTRACTOR, DISTRACTORS = 14, 4, 5  # dashes, dashes, contours
LENGTH, MARGIN, PADDING = 2, 1, 1  # of a dash, around it, at the border; in pixels, as the next
SEED_DISTANCE, RADIUS = 7, 1.5  # of the contours' beginnings; of a disc
FINE = 2  # drawn this much finer, where a dash is one pixel thick
# Of dashes, whose pixels are half covered, to discs: contours have that of a dash too.
BRIGHT, DIM = 2, 2 * 0.75  # distractors, contours
TRIALS, PLACES = 5, 200  # of a distractor; at random, for its first dash
BATCH = 2048  # pictures at once
TURNS = np.radians(np.arange(-81, 82, 18))  # a pixel apart at the distance of a dash and its margin
CHANCE = np.cos(TURNS) ** 2
# Around a dash nothing may come nearer than 1.5 pixels: the published masks, of both margins and
# the thickness, are whole pixels that may be half covered, and leave as much in the median.
REACH = 3  # of the fine grid
STAMP = np.argwhere(np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]) <= REACH) - REACH
ROOM = REACH + 1  # around the fine grid, for stamps
WIDTH = FINE * SIDE + 2 * ROOM
OFFSETS = STAMP @ (WIDTH, 1)  # of a stamp, in a grid's places one after another
POINTS = np.linspace(0, LENGTH, 3)[:, None]  # of a dash


class Fields:
    """Which places are taken, on the fine grid of each of ``n`` pictures."""

    def __init__(self, n: int):
        side = FINE * SIDE
        self.taken = np.zeros((n, WIDTH, WIDTH), bool)  # with room for stamps
        outer = FINE * (PADDING + MARGIN)
        inner = slice(ROOM + outer, ROOM + side - outer)
        self.border = np.ones(self.taken.shape[1:], bool)
        self.border[inner, inner] = False
        self.taken |= self.border

    def places(self, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where points ``[n, ..., 2]`` of these pictures are in all of ``taken``, flat."""
        at = np.floor(FINE * points).astype(np.intp)
        at = np.minimum(np.maximum(at, -1), FINE * SIDE) + ROOM
        rows = rows.reshape(-1, *[1] * (at.ndim - 2))
        return (rows * WIDTH + at[..., 0]) * WIDTH + at[..., 1]

    def free(self, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether all points ``[n, ..., 3, 2]`` of a dash are free in these pictures."""
        return ~self.taken.reshape(-1)[self.places(points, rows)].any(-1)

    def take(self, points: np.ndarray, rows: np.ndarray) -> None:
        """Nothing else may come near these points ``[n, 3, 2]``."""
        self.taken.reshape(-1)[self.places(points, rows)[..., None] + OFFSETS] = True


def unit(angle: np.ndarray) -> np.ndarray:
    """Row and column ``[..., 2]`` of the direction."""
    return np.stack((np.sin(angle), np.cos(angle)), -1)


def dash(start: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The points ``[..., 3, 2]`` of dashes that begin at ``start [..., 2]``."""
    return start[..., None, :] + POINTS * unit(angle)[..., None, :]


def extend(
    rng: np.random.Generator, field: Fields, rows: np.ndarray, last: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The next dash after ``last [n, 3, 2]``: its points, its angle, and whether there is room."""
    angles = angle[:, None] + TURNS  # [n, K]
    pivot = last[:, -1] + MARGIN * unit(angle)
    candidates = dash(pivot[:, None] + MARGIN * unit(angles), angles)  # [n, K, 3, 2]
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
    second = first + SEED_DISTANCE * unit(aside)
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
        for _ in range(TRIALS):
            rows = np.flatnonzero(~there[:, number])
            own = Fields(0)
            own.taken = field.taken[rows]
            every, angle = np.arange(len(rows)), rng.uniform(-np.pi, np.pi, len(rows))
            # Somewhere where a dash in this direction has room.
            starts = rng.uniform(PADDING, SIDE - PADDING, (len(rows), PLACES, 2))
            candidates = dash(starts, angle[:, None])
            fits = own.free(candidates, every)
            whole, last = fits.any(1), candidates[every, fits.argmax(1)]
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


def lines(dashes: np.ndarray) -> np.ndarray:
    """How much of each pixel ``[32, 32]`` dashes ``[k, 3, 2]`` cover, in 0..1."""
    shift = 4  # bits of a fraction of a pixel, which OpenCV centres at whole numbers
    fine = np.zeros((FINE * SIDE, FINE * SIDE), np.uint8)
    ends = np.rint((FINE * dashes[:, [0, 2], ::-1] - 0.5) * (1 << shift)).astype(np.int32)
    for start, end in ends.tolist():
        cv2.line(fine, start, end, 255, 1, cv2.LINE_AA, shift)
    return cv2.resize(fine / 255, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def draw(long: np.ndarray, short: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """A picture, uint8 ``[32, 32]``, whose brightest pixel is 255.

    Args:
        long: dashes of the contours, ``[k, 3, 2]``.
        short: of the distractors.
        discs: their centres ``[2, 2]``.
    """
    picture = np.maximum(DIM * lines(long), BRIGHT * lines(short))
    y, x = np.mgrid[: FINE * SIDE, : FINE * SIDE] + 0.5
    for row, column in FINE * np.rint(discs):
        disc = ((y - row) ** 2 + (x - column) ** 2 <= (FINE * RADIUS) ** 2).astype(np.float32)
        disc = cv2.resize(disc, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
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
            yield draw(*found, discs), label


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
