"""The generator of the demo's data set."""

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from loading import load_tool

SCRIPT = Path(__file__).resolve().parents[2] / "tools/dataset_converters/make_shapes.py"
SMALL = dict(train=5, val=3, size=96, seed=7)


make_shapes = load_tool("dataset_converters/make_shapes.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shapes"
    assert make_shapes.make_dataset(out, **SMALL)
    return out


def fine_pixels(ring):
    """A polygon in the pixels of the grid on which the generator draws outlines."""
    return (ring * make_shapes.SUPERSAMPLE - 0.5).round().astype(np.int32)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the tool in this process; gives exit status, output and errors."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", [SCRIPT.name, *map(str, arguments)])
        capsys.readouterr()
        try:
            status = make_shapes.main()
        except SystemExit as caught:
            status = caught.code
        output, error = capsys.readouterr()
        if isinstance(status, str):  # which Python prints, and ends with 1
            status, error = 1, f"{error}{status}\n"
        return status or 0, output, error

    return call


def test_the_seed_determines_the_data(data, tmp_path):
    make_shapes.make_dataset(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(data)
    make_shapes.make_dataset(tmp_path / "other", **{**SMALL, "seed": 8})
    picture = "coco/train2017/000000000001.jpg"
    assert (tmp_path / "other" / picture).read_bytes() != (data / picture).read_bytes()


def test_a_scene_does_not_depend_on_the_number_of_scenes(data, tmp_path):
    make_shapes.make_dataset(tmp_path / "fewer", **{**SMALL, "train": 2, "val": 1})
    for name in (
        "coco/train2017/000000000002.jpg",
        "ade/annotations/validation/ADE_val_00000001.png",
    ):
        assert (tmp_path / "fewer" / name).read_bytes() == (data / name).read_bytes()


def test_train_and_val_differ(data):
    first = "000000000001.jpg"
    train, val = (data / "coco" / split / first for split in ("train2017", "val2017"))
    assert train.read_bytes() != val.read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_annotations_agree_with_the_index_maps(data, split):
    coco_tools = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(None):
        coco = coco_tools.COCO(str(data / f"coco/annotations/instances_{split}2017.json"))
    assert len(coco.imgs) == SMALL[split]
    assert [c["name"] for c in coco.cats.values()] == list(make_shapes.CLASSES)
    folder = {"train": "training", "val": "validation"}[split]
    for number, image in coco.imgs.items():
        name = f"ADE_{split}_{number:08d}"
        picture = cv2.imread(str(data / f"coco/{split}2017" / image["file_name"]))
        assert picture.shape == (SMALL["size"], SMALL["size"], 3)
        same = cv2.imread(str(data / f"ade/images/{folder}/{name}.jpg"))
        np.testing.assert_array_equal(picture, same)
        index = cv2.imread(str(data / f"ade/annotations/{folder}/{name}.png"), cv2.IMREAD_UNCHANGED)
        assert index.shape == picture.shape[:2]
        assert index.min() >= 1  # 0 would be "unlabelled"
        fine = np.zeros((SMALL["size"] * make_shapes.SUPERSAMPLE,) * 2, np.uint8)
        for annotation in coco.imgToAnns[number]:
            rings = [np.reshape(ring, (-1, 2)) for ring in annotation["segmentation"]]
            x, y, w, h = annotation["bbox"]
            points = np.concatenate(rings)
            corners = [*points.min(0), *points.max(0)]
            np.testing.assert_allclose(corners, [x, y, x + w, y + h], atol=0.4)
            assert points.min() >= 0
            assert points.max() <= SMALL["size"]

            mask = np.zeros_like(fine)
            for ring in rings:
                cv2.fillPoly(mask, [fine_pixels(ring)], 1)
            assert mask.sum() / make_shapes.SUPERSAMPLE**2 == pytest.approx(
                annotation["area"], rel=0.05, abs=1
            )
            # The visible parts of two shapes overlap at most at their borders.
            assert ((fine > 0) & (mask > 0)).sum() <= 0.1 * mask.sum()
            fine[mask > 0] = annotation["category_id"] + 1

            rounded = coco.annToMask(annotation) > 0  # to whole pixels, by pycocotools
            label = index == annotation["category_id"] + 1
            assert (rounded & label).sum() >= 0.8 * rounded.sum()
        painted = fine[2::4, 2::4]
        np.putmask(painted, painted == 0, 1)
        borders = cv2.morphologyEx(index, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        assert (painted != index)[~borders].mean() < 1e-3
        assert (painted == index).mean() > 0.98


def test_a_mask_with_a_hole_becomes_several_polygons():
    mask = np.zeros((80, 80), bool)
    mask[8:72, 8:72] = True
    mask[24:40, 24:40] = False
    mask[48:64, 20:60] = False
    outlines = make_shapes.polygons(mask, np.zeros(2))
    assert len(outlines) > 1
    filled = np.zeros((80, 80), np.uint8)
    for ring in outlines:
        cv2.fillPoly(filled, [fine_pixels(np.reshape(ring, (-1, 2)))], 1)
    np.testing.assert_array_equal(filled.astype(bool), mask)


def test_shapes_are_mostly_inside_and_visible():
    """At least 70 % of each inside the picture, and of that at least 65 % not hidden by others."""
    found, size = 0, (96, 96)
    whole = make_shapes.Window(np.zeros(2), np.array(size), size)
    for seed in range(20):
        front = np.zeros([96 * make_shapes.SUPERSAMPLE] * 2, bool)
        for _, points in reversed(make_shapes.place(np.random.default_rng(seed), size)):
            mask = whole.fill(points)
            assert mask.sum() >= 0.7 * cv2.contourArea(points.astype(np.float32))
            assert (mask & ~front).sum() >= 0.65 * mask.sum()
            front |= mask
            found += 1
    assert found > 40


def test_a_surface_differs_from_what_it_covers():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        picture = np.ones((32, 32, 3), np.float32) * make_shapes.vivid(rng)
        coat = make_shapes.surface(rng, picture, np.ones((32, 32), np.float32), "disc")
        assert np.linalg.norm((coat - picture).mean((0, 1))) > 0.45


def test_colour_does_not_depend_on_the_class():
    """The mean colours of the classes differ by less than chance would explain, times three."""
    colours = [[] for _ in make_shapes.CLASSES]
    for number in range(60):
        picture, index, *_ = make_shapes.draw_scene([0, 0, number], (64, 64))
        for label in np.unique(index[index > 1]):
            colours[label - 2].append(picture[index == label].mean(0))
    overall = np.concatenate(colours)
    for own in colours:
        error = overall.std(0) / len(own) ** 0.5
        assert (abs(np.mean(own, 0) - overall.mean(0)) < 3.5 * error).all()


def hue(picture, mask):
    """Mean hue of the pixels well inside a mask, as a point of the circle."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
    angle = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)[..., 0][inside] * (np.pi / 90)
    return np.array([np.cos(angle).mean(), np.sin(angle).mean()])


@pytest.fixture(scope="module")
def legends():
    """Of scenes: for each shape its class, whether it is a square of the legend, and its hue."""
    found = []
    for size, number in [*(((128, 128), n) for n in range(24)), ((144, 272), 0), ((300, 128), 1)]:
        picture, index, shapes, _ = make_shapes.draw_scene([0, 0, number], size, examples=1)
        assert picture.shape[:2] == index.shape == size
        scene = []
        for place, shape in enumerate(shapes[::-1]):  # as they were drawn: the legend first
            mask = np.zeros(index.shape, np.uint8)
            for ring in shape["segmentation"]:
                cv2.fillPoly(mask, [np.reshape(ring, (-1, 2)).round().astype(np.int32)], 1)
            scene.append((shape["category_id"], place < 3, hue(picture, mask)))
        found.append((scene, index))
    return found


def test_a_legend_shows_each_material_once(legends):
    for scene, index in legends:
        assert [label for label, square, _ in scene if square] == [1, 2, 3]
        assert len(scene) > 6
        assert set(np.unique(index)) == {1, 2, 3, 4}


def test_a_plain_shape_is_of_the_class_of_the_square_of_its_colour(legends):
    for scene, _ in legends:
        squares = {label: colour for label, square, colour in scene if square}
        for label, square, colour in scene:
            if not square:
                distances = {other: np.linalg.norm(colour - c) for other, c in squares.items()}
                assert min(distances, key=distances.get) == label


def test_a_part_of_the_picture_is_drawn_as_the_whole_would_be(monkeypatch):
    size = (150, 200)
    parts = make_shapes.draw_scene([0, 0, 5], size, examples=1)
    window = make_shapes.Window(np.zeros(2), np.array(size[::-1]), size)
    monkeypatch.setattr(make_shapes, "around", lambda *_: window)
    whole = make_shapes.draw_scene([0, 0, 5], size, examples=1)
    assert np.abs(parts[0].astype(int) - whole[0]).max() <= 1
    assert np.array_equal(parts[1], whole[1])
    assert parts[2] == whole[2]


def test_the_colour_alone_does_not_tell_the_class(legends):
    """Hues of each class spread over the circle; every class is as frequent as the others."""
    plain = [
        (label, colour) for scene, _ in legends for label, square, colour in scene if not square
    ]
    for label in (1, 2, 3):
        own = [colour for other, colour in plain if other == label]
        assert np.linalg.norm(np.mean(own, 0)) < 0.5
        assert 0.2 < len(own) / len(plain) < 0.47


def test_the_place_of_a_square_does_not_tell_its_material():
    """Mean places of the materials differ by less than chance would explain, times 3.5."""
    places = []
    for seed in range(60):
        shapes = make_shapes.place_legend(np.random.default_rng(seed), (128, 128))[:3]
        assert [label for label, _ in shapes] == [0, 1, 2]
        places.append([points.mean(0) / make_shapes.SUPERSAMPLE for _, points in shapes])
    places = np.array(places)  # [60, 3, 2]
    assert (places.std(0) > 20).all()
    error = places.std((0, 1)) / 60**0.5
    assert (abs(places.mean(0) - places.mean((0, 1))) < 3.5 * error).all()


def test_a_legend_of_several_examples(tmp_path, call):
    """All squares find a place, each with its material; 99 shapes in all."""
    shapes = make_shapes.place_legend(np.random.default_rng(0), (800, 1344), 32)
    assert [label for label, _ in shapes[:96]] == [0, 1, 2] * 32
    sides = [np.ptp(points, 0) / make_shapes.SUPERSAMPLE for _, points in shapes[:96]]
    assert np.all(np.array(sides) == 28)
    assert len(shapes) == 99
    arguments = ["--legend", "--size", "256", "128", "--train", "1", "--val", "1"]
    assert call(tmp_path / "s", *arguments, "--examples", "2")[0] == 0
    assert call(tmp_path / "s", *arguments)[0] == 1
    assert call(tmp_path / "one", *arguments, "--examples", "1")[0] == 0
    assert "kept" in call(tmp_path / "one", *arguments)[1]
    picture = cv2.imread(str(tmp_path / "s/coco/val2017/000000000001.jpg")).astype(int)
    file = tmp_path / "s/coco/annotations/instances_val2017.json"
    shapes = json.loads(file.read_text())["annotations"][::-1]  # the legend first
    assert [shape["category_id"] for shape in shapes[:6]] == [1, 2, 3] * 2
    for number, shape in enumerate(shapes):
        x, y, width, height = (round(n) for n in shape["bbox"])
        middle = picture[y + height // 3 : y + height * 2 // 3, x + width // 3 : x + width * 2 // 3]
        assert (middle.sum(2).std() > 20) == (number < 6)


def test_legend_data_set(tmp_path, call):
    status, _, error = call(tmp_path / "s", "--legend", "--size", 96)
    assert status == 2
    assert "--legend needs a --size of at least 128, got 96" in error
    assert len(make_shapes.place_legend(np.random.default_rng(0), (800, 1344))) == 99
    status, _, error = call(tmp_path / "s", "--examples", 2)
    assert (status, "--examples are those of a --legend" in error) == (2, True)
    status, _, error = call(tmp_path / "s", "--legend", "--size", 128, 384, "--examples", 4)
    assert (status, "at most 3 at this --size, got 4" in error) == (2, True)
    arguments = ["--legend", "--size", "128", "160", "--train", "1", "--val", "1"]
    assert call(tmp_path / "s", *arguments)[0] == 0
    picture = cv2.imread(str(tmp_path / "s/ade/images/validation/ADE_val_00000001.jpg"))
    assert picture.shape == (128, 160, 3)
    content = (tmp_path / "s/coco/annotations/instances_val2017.json").read_text()
    assert [c["name"] for c in json.loads(content)["categories"]] == list(make_shapes.MATERIALS)


def test_second_call_keeps_a_complete_set_and_refuses_another(tmp_path, call):
    arguments = (tmp_path / "s", "--train", 1, "--val", 1, "--size", 64)
    assert call(*arguments)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    status, output, _ = call(*arguments)
    assert status == 0
    assert "kept" in output
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    status, _, error = call(*arguments, "--seed", 1)
    assert status == 1
    assert error.count("\n") == 1
    assert "other parameters" in error
    assert before.keys() == set(tmp_path.rglob("*"))


def test_disk_full_leaves_nothing_and_the_next_call_recovers(tmp_path, call):
    # No file may grow beyond 4 kB: an image or the JSON cannot be written whole.
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    arguments = (tmp_path / "s", "--train", 12, "--val", 1, "--size", 96)
    failed = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
    )
    assert failed.returncode == 1
    message = failed.stderr.strip()
    assert message.startswith("error: cannot write the data set")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
    assert call(*arguments)[0] == 0
    assert (tmp_path / "s/parameters.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "10"], "argument --size: must be at least 64, got 10"),
        (["--size", "64", "64", "64"], "--size takes one or two numbers, got 3"),
        (["--train", "0"], "argument --train: must be at least 1, got 0"),
        (["--val", "many"], "argument --val: invalid integer value: 'many'"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, call, arguments, message):
    status, _, error = call(tmp_path / "s", *arguments)
    assert status == 2
    assert message in error
    assert not (tmp_path / "s").exists()
