"""Write a small instance data set of textured shapes, in COCO and in ADE20K layout.

    python tools/dataset_converters/make_shapes.py data/shapes --train 1000 --val 120

Every scene is drawn from the seed: several overlapping shapes of five classes, at varied scale,
slant and rotation, on a cluttered background with uneven light, shadows, blur, sensor noise and
JPEG artefacts. As among things in photographs, form and material tell the class: a shape is vivid
where the background is dull, of any colour, and each class has its own pattern at random scale,
direction and contrast. Both layouts hold the same scenes:

    OUT/coco/{train2017,val2017}/*.jpg        OUT/coco/annotations/instances_{train,val}2017.json
    OUT/ade/images/{training,validation}/*.jpg     OUT/ade/annotations/{training,validation}/*.png

Polygons, areas and boxes describe what is *visible* of a shape, and every shape that can be seen
is annotated. Index PNGs follow ADE20K: 0 is "unlabelled" (and never occurs here), 1 the
background, 2 and up the shapes, so `reduce_zero_label=True` gives the classes 0 to 5.

With `--legend` what a shape is can be told only by finding its like elsewhere in the picture. Three
squares, anywhere, show a material each (stripes down or across, checks), each in a colour of its
own; all other shapes are plain, and of the class of the square of their colour. Which colour goes
with which material is drawn anew for every scene. Shapes and their shadows have the same size in
pixels whatever `--size` is; larger pictures hold more of them, up to 99. With `--examples`
there are so many squares of each material, in its colour: size and rarity can be told apart.

The folder gets its name when it is complete; a complete one with the same parameters is kept.
"""

import colorsys
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from mmsoft.conversion import at_least, generate, generator_parser, track, write_coco, write_once

# Raise them when the same parameters no longer give the same pictures.
VERSION, LEGEND_VERSION = 2, 3
CLASSES = ("disc", "bar", "triangle", "crescent", "cross")
MATERIALS = ("upright", "level", "checked")  # of the legend
SUPERSAMPLE = 4  # outlines are drawn this much finer than the picture
MIN_SIZE, LEGEND_SIZE = 64, 128
MAX_SHAPES = 99  # with the legend: COCO's AP counts at most 100 detections of a picture
SPLITS = {"train": ("train2017", "training"), "val": ("val2017", "validation")}


# --------------------------------------------------- textures: [size, size, 3] floats of about 0..1


def noise(rng: np.random.Generator, size: int, cells: float, octaves: int = 4) -> np.ndarray:
    """Multi-octave value noise [size, size] stretched to 0..1; `cells` is the coarsest grid."""
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = min(size, max(2, round(cells * 2**octave)))
        values = rng.random((grid, grid), np.float32)
        field += 0.55**octave * cv2.resize(values, (size, size), interpolation=cv2.INTER_CUBIC)
    return (field - field.min()) / max(float(np.ptp(field)), 1e-6)


def plane(size: int, angle: float) -> np.ndarray:
    """A ramp [size, size] from about -1 to 1 that rises along `angle`."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (2 / size) - 1
    return x * math.cos(angle) + y * math.sin(angle)


def texture(
    rng: np.random.Generator, size: int, colour: np.ndarray, strength: float = 1
) -> np.ndarray:
    """A colour [3] varied by noise, marbled stripes or noise with hard steps."""
    change = np.float32(rng.normal(0, 0.17) + rng.normal(0, 0.03, 3))
    mix = noise(rng, size, rng.uniform(2, 10))
    kind = rng.integers(3)
    if kind == 1:
        waves = plane(size, rng.uniform(0, math.tau)) * np.float32(rng.uniform(4, 16))
        mix = 0.5 + 0.5 * np.sin(waves + np.float32(rng.uniform(1, 6)) * mix)
    elif kind == 2:
        steps = rng.integers(2, 5)
        mix = np.floor(mix * steps) / np.float32(steps)
    grain = noise(rng, size, size / 4, 2)[..., None] - 0.5
    return colour + strength * change * (mix[..., None] - 0.5) + np.float32(0.12) * grain


def dull(rng: np.random.Generator) -> np.ndarray:
    """A colour [3] near grey: earth, stone, bark, sky."""
    return (rng.uniform(0.15, 0.85) + rng.normal(0, 0.04, 3)).astype(np.float32)


def vivid(rng: np.random.Generator) -> np.ndarray:
    """A saturated colour [3] of any hue."""
    colour = rng.permutation([0.0, rng.uniform(0, 1), 1.0])
    return (rng.uniform(0.05, 0.2) + rng.uniform(0.5, 0.75) * colour).astype(np.float32)


def pattern(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """The material of class `name` as lightness [size, size], about -1 to 1."""
    angle = rng.uniform(0, math.tau)
    frequency = size / rng.uniform(7, 11) * math.pi  # periods of 7 to 11 pixels
    if name == "disc":  # smooth
        return plane(size, angle)
    stripes = np.sin(plane(size, angle) * frequency)
    if name == "bar":
        return stripes
    if name == "triangle":  # checks
        return stripes * np.sin(plane(size, angle + math.pi / 2) * frequency)
    patches = noise(rng, size, size / rng.uniform(8, 14), 1)
    if name == "crescent":  # soft patches
        return 2 * patches - 1
    return np.where(patches > 0.65, 1.0, -0.3)  # cross: spots


def surface(
    rng: np.random.Generator, picture: np.ndarray, alpha: np.ndarray, name: str
) -> np.ndarray:
    """A vivid surface of class `name`, unlike in mean colour to what it will cover; square."""
    covered = (picture * alpha[..., None]).sum((0, 1)) / alpha.sum()
    colour = vivid(rng)
    while np.linalg.norm(colour - covered) < 0.5:
        colour = vivid(rng)
    contrast = np.float32(rng.uniform(0.25, 0.4))
    return colour * (1 + contrast * pattern(rng, max(alpha.shape), name)[..., None])


def palette(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """So many vivid colours [3] that cannot be taken for each other, of six hues."""
    hues = rng.permutation(6)[:count] / 6 + rng.uniform(-0.01, 0.01, count)
    return [np.array(colorsys.hsv_to_rgb(hue % 1, 0.9, 0.9), np.float32) for hue in hues]


def material(size: int, name: str) -> np.ndarray:
    """A pattern of the legend as lightness [size, size], 0.5 or 1, periods of 6 pixels."""
    stripes = np.broadcast_to(np.arange(size) // 3 % 2, (size, size))
    dark = {"upright": stripes, "level": stripes.T, "checked": stripes ^ stripes.T}[name]
    return (1 - 0.5 * dark).astype(np.float32)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A few textured regions with soft or hard borders, and clutter unlike any class."""
    picture = texture(rng, size, dull(rng), 0.5)
    for _ in range(rng.integers(0, 3)):
        border = noise(rng, size, rng.uniform(2, 4), 3) - rng.uniform(0.4, 0.7)
        region = np.clip(border * 10 ** rng.uniform(0.3, 1.3) + 0.5, 0, 1)[..., None]
        picture += region * 0.7 * (texture(rng, size, dull(rng), 0.5) - picture)
    for _ in range(rng.integers(0, 3)):  # curved strokes: twigs, cables, cracks
        ends = rng.uniform(-0.1, 1.1, (3, 1, 2)) * size
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
        stroke = np.zeros((size, size), np.uint8)
        width = max(1, round(size * rng.uniform(0.005, 0.03)))
        cv2.polylines(stroke, [curve.round().astype(np.int32)], False, 255, width, cv2.LINE_AA)
        picture += stroke[..., None] / np.float32(255) * (texture(rng, size, dull(rng)) - picture)
    return picture


# ------------------------------------------------------------------------------------------- shapes


def outline(rng: np.random.Generator, name: str) -> np.ndarray:
    """The polygon [points, 2] of a random shape of class `name`, about within the unit circle."""
    if name == "disc":
        points = arc(0, math.tau)
    elif name == "bar":
        half = rng.uniform(0.25, 0.5)
        points = np.array([[-1, -half], [1, -half], [1, half], [-1, half]]) * 0.95
    elif name == "triangle":
        angles = math.tau / 3 * np.arange(3) + rng.uniform(-0.25, 0.25, 3)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif name == "crescent":
        # From horn to horn along the unit circle, and back along a circle through the same horns.
        horn, depth = rng.uniform(1.8, 2.2), rng.uniform(0.0, 0.3)
        x, y = math.cos(horn), math.sin(horn)
        middle = (x**2 + y**2 - depth**2) / (2 * (x - depth))
        inner = math.atan2(y, x - middle)
        back = arc(inner, -inner) * (depth - middle) + [middle, 0]
        points = np.concatenate([arc(-horn, horn), back])
    else:
        arm = rng.uniform(0.2, 0.33)
        corner = np.array([[1, -arm], [1, arm], [arm, arm]])
        points = np.concatenate(
            [corner @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        )
    squash = np.diag([1, rng.uniform(0.75, 1)])  # seen at a slant
    return points @ squash @ rotation(rng.normal(0, 0.25))


def arc(start: float, end: float) -> np.ndarray:
    """Points [64, 2] along the unit circle."""
    angles = np.linspace(start, end, 64)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def rotation(angle: float) -> np.ndarray:
    """The 2x2 rotation by `angle`."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


class Window:
    """A part of the picture.

    Args:
        low: x and y of its first pixel.
        high: those past its last.
        size: height and width of the picture, which a window ends at.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, size: tuple[int, int]):
        x, y = np.maximum(np.floor(low), 0).astype(int)
        right, bottom = np.minimum(np.ceil(high), size[::-1]).astype(int)
        self.low, self.shape = np.array([x, y]), (bottom - y, right - x)
        self.pixels = slice(y, bottom), slice(x, right)
        fine = [slice(s.start * SUPERSAMPLE, s.stop * SUPERSAMPLE) for s in self.pixels]
        self.fine = fine[0], fine[1]

    def fill(self, points: np.ndarray) -> np.ndarray:
        """The part of a polygon's supersampled mask that lies here, bool."""
        mask = np.zeros([n * SUPERSAMPLE for n in self.shape], np.uint8)
        whole = points.round().astype(np.int32) - self.low.astype(np.int32) * SUPERSAMPLE
        cv2.fillPoly(mask, [whole], 1)
        return mask.astype(bool)


def around(points: np.ndarray, margin: float, size: tuple[int, int]) -> Window:
    """A polygon's surroundings, ``margin`` pixels wide."""
    low, high = (points.min(0) / SUPERSAMPLE, points.max(0) / SUPERSAMPLE + 1)
    return Window(low - margin, high + margin, size)


def place(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[int, np.ndarray]]:
    """Choose shapes, the nearest last: their classes and supersampled polygons.

    A candidate is dropped if it would lie mostly outside or hide too much of an earlier one, so
    that whatever stays can be recognized and nothing unannotated remains in the picture.
    """
    whole_picture = Window(np.zeros(2), np.array(size[::-1]), size)
    extent = np.array(size[::-1]) * SUPERSAMPLE
    shapes: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    visible: list[np.ndarray] = []
    for _ in range(rng.integers(4, 10)):
        label = int(rng.integers(len(CLASSES)))
        radius = extent.max() * math.exp(rng.uniform(math.log(0.09), math.log(0.26)))
        points = outline(rng, CLASSES[label]) * radius + rng.uniform(0.02, 0.98, 2) * extent
        mask = whole_picture.fill(points)
        whole = cv2.contourArea(points.astype(np.float32))
        kept = [seen & ~mask for seen in visible]
        hidden = any(seen.sum() < 0.65 * area for seen, area in zip(kept, areas, strict=True))
        if mask.sum() >= 0.7 * whole and not hidden:
            shapes.append((label, points))
            areas.append(int(mask.sum()))
            visible = [*kept, mask]
    return shapes


def place_legend(
    rng: np.random.Generator, size: tuple[int, int], examples: int = 1
) -> list[tuple[int, np.ndarray]]:
    """The legend's squares of each material in turn, then plain shapes; none overlaps another.

    Of the plain ones those are left out that find no place.
    """
    taken, kinds = np.zeros(size, bool), len(MATERIALS)
    count = kinds * examples
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    shapes: list[tuple[int, np.ndarray]] = []
    plain = min(round(6 * size[0] * size[1] / LEGEND_SIZE**2), MAX_SHAPES - count)
    for number in range(count + plain):
        legend = number < count
        width = 28 if legend else int(rng.integers(22, 30))
        for _ in range(1000 if legend else 30):
            x, y = rng.integers(0, np.array(size[::-1]) - width + 1)
            if not taken[max(y - 2, 0) : y + width + 2, max(x - 2, 0) : x + width + 2].any():
                break
        else:
            continue
        taken[y : y + width, x : x + width] = True
        points = square
        if not legend and rng.random() < 0.5:
            points = outline(rng, "disc")
        elif not legend:
            points = 0.75 * square @ rotation(rng.uniform(0, math.tau))
        points = (points * width / 2 + [x + width / 2, y + width / 2]) * SUPERSAMPLE
        shapes.append((number % kinds if legend else int(rng.integers(kinds)), points))
    return shapes


def polygons(mask: np.ndarray, low: np.ndarray) -> list[list[float]]:
    """The outlines of a supersampled mask in picture coordinates, as COCO writes them.

    The mask is that of a window whose first pixel is `low`.

    COCO polygons cannot have holes: a mask with a hole (a shape in front of a larger one) is cut in
    two through the hole's centre, as often as needed.
    """
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for contour, (_, _, _, parent) in zip(contours, tree[0], strict=True):
        if parent >= 0:
            x, _, width, _ = cv2.boundingRect(contour)
            left = mask.copy()
            left[:, x + width // 2 :] = False
            return polygons(left, low) + polygons(mask & ~left, low)
        points = cv2.approxPolyDP(contour, 0.8, True)[:, 0]
        if len(points) >= 3:
            # Contours run through the centres of the finer pixels.
            rings.append(((points + 0.5) / SUPERSAMPLE + low).round(3).ravel().tolist())
    return rings


# ------------------------------------------------------------------------------------------- scenes


def coverage(mask: np.ndarray) -> np.ndarray:
    """How much of each picture pixel a supersampled mask covers."""
    size = mask.shape[1] // SUPERSAMPLE, mask.shape[0] // SUPERSAMPLE
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def photograph(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Light, lens and sensor: uneven light, colour cast, blur, noise; uint8 [height, width, 3]."""
    size, (height, width) = max(picture.shape), picture.shape[:2]
    light = 1 + rng.uniform(0, 0.35) * plane(size, rng.uniform(0, math.tau))
    vignette = 1 - rng.uniform(0, 0.25) * (plane(size, 0) ** 2 + plane(size, math.pi / 2) ** 2)
    light = (light * vignette)[:height, :width]
    picture = picture * light[..., None] * rng.uniform(0.85, 1.15, 3)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.7))
    picture = picture + rng.normal(0, rng.uniform(0.005, 0.02), picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def draw_scene(
    seed: list[int], size: tuple[int, int], examples: int = 0
) -> tuple[np.ndarray, np.ndarray, list[dict], int]:
    """Draw one scene: picture (BGR), index map, COCO annotations (no ids), JPEG quality.

    A part of a square one, if it is not square. The legend has `examples` squares of each material.
    """
    cv2.setNumThreads(1)  # the scenes share the cores already
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, np.ndarray]] = []
    while not shapes:
        shapes = place_legend(rng, size, examples) if examples else place(rng, size)
    legend, squares = examples > 0, examples * len(MATERIALS)
    colours = palette(rng, len(MATERIALS)) if legend else []
    side, picture_window = max(size), Window(np.zeros(2), np.array(size[::-1]), size)
    picture = background(rng, side)[: size[0], : size[1]]
    sun = rng.uniform(0, math.tau)
    across, away = plane(side, sun), np.array([math.cos(sun), math.sin(sun)])
    for number, (label, points) in enumerate(shapes):
        reach = (LEGEND_SIZE if legend else side) * rng.uniform(0.005, 0.03)
        # A shadow of any weight ends within 4 standard deviations of the blur.
        window = around(points, reach + 4 * (reach + 0.5) + 2, size) if legend else picture_window
        here = window.pixels
        alpha = coverage(window.fill(points))
        shift = np.concatenate((np.eye(2), reach * away[:, None]), 1).astype(np.float32)
        shadow = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
        shadow = cv2.GaussianBlur(shadow, (0, 0), reach + 0.5)
        picture[here] *= 1 - rng.uniform(0.1, 0.5) * shadow[..., None]
        if not legend:
            coat = surface(rng, picture, alpha, CLASSES[label])[here]
        elif number < squares:
            coat = colours[label] * material(side, MATERIALS[label])[here][..., None]
        else:
            coat = np.tile(colours[label], (*window.shape, 1))
        coat *= (1 - rng.uniform(0, 0.25) * across[here])[..., None]
        picture[here] += alpha[..., None] * (coat - picture[here])

    annotations = []
    covers = np.zeros((len(CLASSES) + 1, *size), np.float32)
    front = np.zeros([n * SUPERSAMPLE for n in size], bool)
    for label, points in reversed(shapes):
        window = around(points, 1, size)
        mask = window.fill(points)
        seen = mask & ~front[window.fine]
        front[window.fine] |= mask
        covers[label + 1][window.pixels] += coverage(seen)
        outline = polygons(seen, window.low)
        # The box is that of the outline: a sliver too thin for a polygon does not stretch it.
        points = np.concatenate([np.reshape(ring, (-1, 2)) for ring in outline])
        low, high = points.min(0), points.max(0)
        annotations.append(
            {
                "category_id": label + 1,
                "segmentation": outline,
                "area": float(seen.sum()) / SUPERSAMPLE**2,
                "bbox": np.concatenate([low, high - low]).round(3).tolist(),
            }
        )
    covers[0] = 1 - covers[1:].sum(0)
    index = (covers.argmax(0) + 1).astype(np.uint8)  # ADE20K: 0 is kept for "unlabelled"
    return photograph(rng, picture), index, annotations, int(rng.integers(60, 91))


# -------------------------------------------------------------------------------------------- files


def save(path: Path, image: np.ndarray, options: tuple[int, ...] = ()) -> None:
    """Encode and write; unlike `cv2.imwrite` this raises when the disk is full."""
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def write_split(
    pool: ProcessPoolExecutor,
    root: Path,
    split: str,
    count: int,
    size: tuple[int, int],
    seed: int,
    examples: int,
) -> None:
    """Write one split in both layouts."""
    coco, ade = SPLITS[split]
    for folder in (f"coco/{coco}", f"ade/images/{ade}", f"ade/annotations/{ade}"):
        (root / folder).mkdir(parents=True)
    results: list[tuple[dict, list]] = []
    print(f"{split}: drawing {count} scenes")
    # One random generator per scene: a scene depends on neither the others nor the order.
    seeds = [[seed, len(split), number] for number in range(1, count + 1)]
    scenes = pool.map(draw_scene, seeds, [size] * count, [examples] * count, chunksize=4)
    for number, (picture, index, shapes, quality) in enumerate(track(scenes, count), 1):
        jpeg = root / "coco" / coco / f"{number:012d}.jpg"
        name = f"ADE_{split}_{number:08d}"
        save(jpeg, picture, (cv2.IMWRITE_JPEG_QUALITY, quality))
        shutil.copyfile(jpeg, root / "ade/images" / ade / f"{name}.jpg")
        save(root / "ade/annotations" / ade / f"{name}.png", index)
        image = {"file_name": jpeg.name, "width": size[1], "height": size[0]}
        results.append((image, shapes))
    write_coco(root / f"coco/annotations/instances_{coco}.json", results, class_names(examples > 0))


def class_names(legend: bool) -> tuple[str, ...]:
    """Of the shapes, in the order of their numbers."""
    return MATERIALS if legend else CLASSES


def make_dataset(
    out: Path, train: int, val: int, size: int | list[int], seed: int, examples: int = 0
) -> bool:
    """Write the data set to the folder `out`, whole or not at all; False if it was there.

    With a legend if it has examples.
    """
    legend = examples > 0
    version = LEGEND_VERSION if legend else VERSION
    numbers = dict(version=version, train=train, val=val, size=size, seed=seed)
    if examples > 1:  # sets that were made before have no such number
        numbers["examples"] = examples
    height, width = (size, size) if isinstance(size, int) else size

    def write(folder: Path) -> None:
        with ProcessPoolExecutor() as pool:
            for split, count in (("train", train), ("val", val)):
                write_split(pool, folder, split, count, (height, width), seed, examples)

    return write_once(out, numbers | {"classes": list(class_names(legend))}, write)


def main() -> None:
    """Read the command line and write the data set."""
    parser = generator_parser(__doc__, dict(train=1000, val=120), "images")
    size = "height and width of an image in pixels, one number for both (160)"
    parser.add_argument("--size", type=at_least(MIN_SIZE), nargs="+", default=160, help=size)
    parser.add_argument("--legend", action="store_true", help="the data set that needs attention")
    squares = "with --legend: squares of each material (1)"
    parser.add_argument("--examples", type=at_least(1), help=squares)
    args = parser.parse_args()
    if isinstance(args.size, list):
        if len(args.size) > 2:
            parser.error(f"--size takes one or two numbers, got {len(args.size)}")
        args.size = args.size[0] if len(set(args.size)) == 1 else args.size
    smallest = min(args.size) if isinstance(args.size, list) else args.size
    if args.legend and smallest < LEGEND_SIZE:
        parser.error(f"--legend needs a --size of at least {LEGEND_SIZE}, got {smallest}")
    if args.examples and not args.legend:
        parser.error("--examples are those of a --legend")
    args.examples = (args.examples or 1) if args.legend else 0
    height, width = args.size if isinstance(args.size, list) else (args.size, args.size)
    # Not denser than in the smallest picture: a square that finds no place would be missing.
    most = min(height * width // LEGEND_SIZE**2, MAX_SHAPES // len(MATERIALS))
    if args.examples > most:
        parser.error(f"--examples can be at most {most} at this --size, got {args.examples}")
    del args.legend
    generate(args.out, lambda: make_dataset(**vars(args)))


if __name__ == "__main__":
    main()
