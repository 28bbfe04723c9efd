"""The tools that draw a model's attention, landmarks and convergence, on generated images."""

import csv
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from true_layout import make_demo_data

from mmsoft import visualization
from mmsoft.analysis import (
    attention_usage,
    capture,
    landmark_regions,
    load_image,
    load_model,
)

for package in ("matplotlib", "mmdet"):
    pytest.importorskip(package)

CONFIG = "configs/demo/retinanet_softpp-mini_fpn_shapes.py"
SIZE = 64


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """Data where the configs look for them, and a checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("data")
    make_demo_data(folder, train=1, val=3, size=SIZE)
    torch.manual_seed(0)
    backbone = dict(landmarks="released", max_landmarks=None)
    text = f"_base_ = {str(root / CONFIG)!r}\nmodel = dict(backbone={backbone!r})\n"
    (folder / "config.py").write_text(text)
    model = load_model(Config.fromfile(folder / "config.py"))
    torch.save(dict(state_dict=model.state_dict()), folder / "model.pth")
    return folder


@pytest.fixture
def run(folder, monkeypatch, run_tool):
    """Run a tool in that folder; returns status, output and errors."""
    monkeypatch.chdir(folder)
    return lambda tool, *arguments: run_tool(f"analysis_tools/{tool}.py", *arguments)


@pytest.fixture
def image(folder):
    return next((folder / "data/shapes/coco/val2017").glob("*.jpg"))


@pytest.fixture
def drawn(monkeypatch):
    """Record the arguments of a function that draws, by its name."""
    recorded = {}

    def record(name):
        draw = getattr(visualization, name)

        def draw_and_record(*arguments, **options):
            recorded[name] = arguments
            return draw(*arguments, **options)

        monkeypatch.setattr(visualization, name, draw_and_record)
        return recorded

    return record


@pytest.fixture
def state(folder, image):
    """What the tools should show: stage 1 of the checkpoint on the image."""
    config = Config.fromfile(folder / "config.py")
    model = load_model(config, str(folder / "model.pth"))
    with torch.no_grad(), capture(model, (1, 0)) as states:
        model.backbone(load_image(config, model, image).inputs)
    return states[1, 0]


def read(path):
    picture = cv2.imread(str(path))
    assert picture is not None
    assert picture.std() > 10
    return picture


def test_attention(run, image, folder, drawn, state):
    recorded = drawn("draw_attention")
    options = ["--query", "20,30", "--query", "63,63", "--stage", "1", "--compare", "softmax"]
    status, out, _ = run(
        "visualize_attention",
        "config.py",
        image,
        "model.pth",
        *options,
        "--out",
        "sheet.png",
    )
    assert status == 0
    usage = attention_usage(state)  # of an untrained model
    assert out.splitlines() == [
        *(
            f"head {head}: effective rank {rank:.2f}, all rows are nearly multiples of one and "
            f"{100 * varying:.0f}% of its output differs between tokens: rows hardly depend on the "
            "query"
            for head, (rank, varying) in enumerate(zip(usage.rank, usage.varying))
        ),
        "sheet.png",
    ]
    # 2 queries; image, 2 heads, mean, softmax and the colour bar
    assert read(folder / "sheet.png").shape[1] == 1130
    queries, maps = recorded["draw_attention"][1:3]
    assert queries == [(20, 30), (63, 63)]
    # The test pipeline enlarges 64 pixels to 160: 20 x 20 tokens of 8.
    rows = state.attention_rows([9 * 20 + 6, 19 * 20 + 19])[0].unflatten(-1, (20, 20))
    assert list(maps) == ["SOFT++, head 0", "SOFT++, head 1", "SOFT++, mean", "softmax"]
    for shown, expected in zip(maps.values(), (*rows, rows.mean(0))):
        np.testing.assert_allclose(shown, expected, rtol=1e-6)


def test_rows_that_are_multiples_of_one_depend_on_no_query(run, image, folder):
    """However much their sizes differ: one landmark, and queries that are far apart."""
    weights = torch.load(folder / "model.pth")
    for name, tensor in weights["state_dict"].items():
        if name.endswith("attn.query.weight"):
            tensor *= 16
    torch.save(weights, folder / "far.pth")
    options = ["--query", "20,30", "--stage", "1", "--out", "far.png"]
    config = Config.fromfile(folder / "config.py")
    for most in (1, None):
        config.model.backbone.max_landmarks = most
        model = load_model(config, str(folder / "far.pth"))
        with torch.no_grad(), capture(model, (1, 0)) as states:
            model.backbone(load_image(config, model, image).inputs)
        usage = attention_usage(states[1, 0])
        assert (usage.varying > 0.5).all()
        of_one = usage.rank < 1.1
        assert of_one.all() if most == 1 else not of_one.all(), usage.rank
        budget = f"model.backbone.max_landmarks={most}"
        status, out, errors = run(
            "visualize_attention", "config.py", image, "far.pth", *options, "--cfg-options", budget
        )
        assert status == 0, errors
        why = ", all rows are nearly multiples of one: rows hardly depend on the query"
        assert out.splitlines()[:2] == [
            f"head {head}: effective rank {rank:.2f}{why * bool(of_one[head])}"
            for head, rank in enumerate(usage.rank)
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--query", "64,3"],
            r"query 64,3 is outside the image: x must be in 0..63 and y in 0..63",
        ),
        (["--query", "3,3", "--stage", "3"], "stage 3 has no softmax-free attention; choose one"),
        (["--query", "3,3", "--block", "1"], "stage 0 has 1 block(s), numbered from 0; got block"),
        (["--query", "3,3", "--head", "1"], "stage 0 has 1 head(s), from 0; got head 1"),
    ],
)
def test_bad_input_is_one_line(run, image, options, message):
    status, out, errors = run("visualize_attention", "config.py", image, "model.pth", *options)
    assert (status, out) == (1, "")
    assert errors.startswith(f"visualize_attention: {message}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("method", ["performer", "nystromformer"])
def test_a_missing_package_is_one_line(run, image, folder, monkeypatch, method):
    package = dict(performer="performer_pytorch", nystromformer="nystrom_attention")[method]
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--query", "3,3", "--compare", method, "--out", "none.png"]
    status, _, errors = run("visualize_attention", "config.py", image, "model.pth", *options)
    assert status == 1
    assert "pip install" in errors
    assert errors.count("\n") == 1
    assert not (folder / "none.png").exists()


def test_landmarks(run, image, folder, drawn, state):
    recorded = drawn("draw_landmarks")
    options = ["--stage", "1", "--head", "1"]
    status, out, _ = run("visualize_landmarks", "config.py", image, "model.pth", *options)
    regions, strength = (
        t[0, 1].unflatten(0, (20, 20)) for t in landmark_regions(state.q, state.landmarks)
    )
    np.testing.assert_array_equal(recorded["draw_landmarks"][1], regions)
    np.testing.assert_allclose(recorded["draw_landmarks"][2], strength, rtol=1e-6)
    assert (status, out) == (0, "landmarks.png\nspectrum.png\n")
    assert read(folder / "landmarks.png").shape[1] == 1120
    assert read(folder / "spectrum.png").shape == (520, 640, 3)


def test_landmarks_by_content(run, image, folder, drawn):
    """Those of the head alone, at the patches that it chose."""
    options = ["--stage", "1", "--head", "1", "--cfg-options", "model.backbone.landmarks=content"]
    recorded = drawn("draw_landmarks")
    config = Config.fromfile(folder / "config.py")
    config.model.backbone.landmarks = "content"
    model = load_model(config)
    torch.save(dict(state_dict=model.state_dict()), folder / "content.pth")
    status, out, errors = run("visualize_landmarks", "config.py", image, "content.pth", *options)
    assert (status, out) == (0, "landmarks.png\n"), errors
    with torch.no_grad(), capture(model, (1, 0)) as states:
        model.backbone(load_image(config, model, image).inputs)
    kept = states[1, 0].present[0, 1]
    centres = recorded["draw_landmarks"][3]
    patches = states[1, 0].index[0, 1][kept]
    where = torch.stack((patches // 5, patches % 5), 1) * 4 + 1.5  # of 5 x 5 patches of 4 x 4
    np.testing.assert_array_equal(centres, where)
    assert recorded["draw_landmarks"][1].max() < len(centres)


def test_usage_of_attention(run, image, state):
    status, out, errors = run("attention_usage", "config.py", "model.pth", image, image)
    assert status == 0, errors
    head, _, *rows = out.splitlines()
    assert head.split()[1::2] == ["block", "landmarks", "nearest", "rank", "ratio", "varying"]
    assert [row.split()[1] for row in rows] == ["1.1", "2.1", "3.1", "3.2"]
    usage = attention_usage(state)
    shown = [float(value) for value in rows[1].split("|")[2:-1]]
    expected = [getattr(usage, name).mean().item() for name in head.split()[3::2]]
    np.testing.assert_allclose(shown, expected, atol=0.006)


STOCK = ("test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False")


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_budgets_are_stock_tests(run, folder, root):
    """The AP of `mim test`, which an untrained model has none of, and the landmarks that it had."""
    options = ("--budgets", "2", "all", "--solvers", "direct", "newton", "--json", "rows.json")
    data = ("--data", "data/shapes/coco")
    arguments = (*options, *data, "--cfg-options", *STOCK)
    status, out, errors = run("landmark_budgets", "config.py", "model.pth", *arguments)
    assert status == 0, errors
    head, _, *table = out[out.index("| data") :].splitlines()
    about = ["data", "model", "seed", "size"]
    assert cells(head) == [*about, "budget", "solver", "landmarks", "coco/bbox_mAP"]
    assert cells(table[0])[1:4] == ["released", "0", "[160, 160]"]
    found = [cells(line)[4:7] for line in table]
    assert found == [
        [most, solver, landmarks]
        for solver in ("direct", "newton")
        for most, landmarks in (("2", "2"), ("all", "25"))
    ]
    assert len(json.loads((folder / "rows.json").read_text())) == 4
    shutil.copytree(folder / "data/shapes/coco", folder / "other")  # of one image
    names = folder / "other/annotations/instances_val2017.json"
    content = json.loads(names.read_text())
    content["images"] = content["images"][:1]
    names.write_text(json.dumps(content))
    arguments = (*options[:2], *options[-2:], "--data", "other", "--cfg-options", *STOCK)
    status, out, errors = run("landmark_budgets", "config.py", "model.pth", *arguments)
    assert (status, "(test) [1/1]" in out + errors) == (0, True), errors
    assert len(json.loads((folder / "rows.json").read_text())) == 5


def test_budgets_by_size_of_the_image(run, folder):
    """AP of the images of each size, of the test that gives COCO's."""
    shutil.copytree(folder / "data/shapes/coco", folder / "sizes")
    names = folder / "sizes/annotations/instances_val2017.json"
    content = json.loads(names.read_text())
    content["images"][0] |= dict(height=40, width=50)  # as if
    names.write_text(json.dumps(content))
    options = ("--budgets", "2", "--by-size", "60", "500", "--data", "sizes")
    status, out, errors = run(
        "landmark_budgets", "config.py", "model.pth", *options, "--cfg-options", *STOCK
    )
    assert status == 0, errors
    head, _, only = map(cells, out[out.index("| data") :].splitlines())
    assert head[-4:] == [
        "coco/bbox_mAP",
        *(f"bbox {s}" for s in ("0 to 60", "60 to 500", "500 to inf")),
    ]
    assert only[-1] == ""  # no image is so large
    assert all(0 <= float(value) <= 1 for value in only[-4:-1])


def test_sizes_need_annotations_that_have_them(run, folder, root):
    arguments = ("model.pth", "--by-size", "90")
    status, _, errors = run(
        "landmark_budgets", root / "configs/demo/upernet_softpp-mini_shapes.py", *arguments
    )
    assert status == 2
    assert "needs a config whose test has annotations of COCO's" in errors


def test_budgets_of_landmarks_by_content_need_no_solver(run, folder, root):
    text = f"_base_ = {str(root / CONFIG)!r}\n"
    (folder / "content.py").write_text(text)
    model = load_model(Config.fromfile(folder / "content.py"))
    torch.save(dict(state_dict=model.state_dict()), folder / "content.pth")
    options = ("--budgets", "1", "all", "--blocks", "--cfg-options", *STOCK)
    status, out, errors = run("landmark_budgets", "content.py", "content.pth", *options)
    assert status == 0, errors
    head, _, one, every = map(cells, out[out.index("| budget") :].splitlines())
    assert head == ["budget", "solver", "1.1", "2.1", "3.1", "3.2"]
    assert every == ["all", "none", *4 * ["0.000"]]
    assert one[:2] == ["1", "none"]
    assert all(float(value) > 0.005 for value in one[2:])
    options = ("--choice", "even", *options)
    status, out, errors = run("landmark_budgets", "content.py", "content.pth", *options)
    assert status == 0, errors
    _, _, even, _ = map(cells, out[out.index("| budget") :].splitlines())
    assert even[:2] == one[:2]
    assert even[2:] != one[2:]
    status, _, errors = run("landmark_budgets", "config.py", "model.pth", *options)
    assert (status, errors.splitlines()[-1]) == (
        1,
        "landmark_budgets: landmarks='released' are an even grid: nothing chooses them",
    )


def test_convergence(run, folder):
    status, out, errors = run(
        "newton_convergence",
        "config.py",
        "model.pth",
        "--images=2",
        "--out=curve.png",
        "--cfg-options",
        *STOCK,
    )
    assert (status, out.splitlines()[-2:]) == (0, ["curve.png", "curve.csv"])
    assert "2/2" in errors  # progress
    read(folder / "curve.png")
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 21  # stages, rules, steps from 0 to 20
    assert {row["images"] for row in rows} == {"2"}
    counts = {row["stage"]: int(row["values"]) for row in rows}
    assert counts == {"0": 2 * 1, "1": 2 * 2, "2": 2 * 2 * 3}  # images, blocks, heads
    for stage in "012":
        curve = [float(r["mean"]) for r in rows if (r["stage"], r["rule"]) == (stage, "mmsoft")]
        assert 0.5 < curve[0] <= 1
        assert curve[-1] < 0.02
        for row in rows:
            assert float(row["q10"]) <= float(row["q90"]) <= float(row["max"])


def test_attention_of_segmentors_and_classifiers(run, root, image, folder):
    pytest.importorskip("mmseg")
    pytest.importorskip("mmpretrain")
    for config in (
        "configs/demo/upernet_softpp-mini_shapes.py",
        "configs/soft/softpp-tiny_8xb128_in1k.py",
    ):
        options = ["--query", "30,30", "--stage", "2", "--head", "0", "1", "--out", "other.png"]
        status, out, errors = run("visualize_attention", root / config, image, *options)
        assert (status, out.splitlines()[-1:]) == (0, ["other.png"]), errors
        assert read(folder / "other.png").shape[1] == 920
        (folder / "other.png").unlink()
    assert np.all(np.array(cv2.imread(str(image)).shape[:2]) == SIZE)
