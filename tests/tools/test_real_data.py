"""Real images: the page, its rows, and training on data as the converters write them.

The long tests convert the real archives, `dsb2018.tar` and `bccd.tar` in the folder that
MMSOFT_REAL_DATA names (default: `../shared/data` beside the repository), and are skipped without.
"""

import json
import os
import subprocess
import sys
import tarfile
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import pytest
from loading import load_tool
from mmengine import dump
from mmengine.config import Config
from PIL import Image
from pretended_mim import pretend_mim
from pycocotools import mask

from mmsoft.builder import build_model
from mmsoft.commands import mim, read_scalars
from mmsoft.rows import digest

ROOT = Path(__file__).parents[2]
ARCHIVES = Path(os.environ.get("MMSOFT_REAL_DATA", ROOT.parent / "shared/data"))
MINI = dict(
    mask_rcnn="nuclei/mask-rcnn_softpp-mini_fpn_nuclei.py",
    upernet="nuclei/upernet_softpp-mini_nuclei.py",
    retinanet="bccd/retinanet_softpp-mini_fpn_bccd.py",
)


@pytest.fixture(scope="module")
def tool():
    return load_tool("dev/real_data.py")


# ---------------------------------------------------------------------------------- the page


def test_the_page_is_current(tool):
    text = tool.render(
        tool.read(tool.ROWS),
        tool.times_by_config(tool.TIMES),
        tool.read_budgets(tool.BUDGETS),
        json.loads(tool.LARGEST.read_text()),
    )
    assert tool.PAGE.read_text() == text, "run real_data.py table"


def test_every_row_is_of_a_config_of_the_same_schedule_and_size(tool):
    """A row of an older one would stand beside the others as if it were of the same."""
    rows = sorted(tool.read(tool.ROWS), key=lambda row: row["config"])
    assert rows
    for name, of_config in groupby(rows, lambda row: row["config"]):
        config = Config.fromfile(ROOT / "configs" / name)
        expected = digest(config)  # before building changes it
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
        for row in of_config:
            assert row["digest"] == expected, name
            assert row["scheduled_iterations"] == config.train_cfg.max_iters, name
            assert row["parameters"] == parameters, name


def row(config, seed=0, iterations=10, score=0.5, memory=5e8, **changes):
    return dict(
        config=config,
        seed=seed,
        commit="0123456789ab",
        iterations=iterations,
        scheduled_iterations=10,
        metrics={"mIoU": 100 * score} if "upernet" in config else {"coco/bbox_mAP": score},
        parameters=9_000_000 if "softpp" in config else 3_000_000,
        peak_bytes=int(memory),
        threads=1,
        device="a processor",
        versions=dict(torch="2.13.0"),
        **changes,
    )


def lines(page):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def test_seeds_share_a_line_and_rows_are_in_the_order_of_their_parameters(tool):
    name = "nuclei/upernet_softpp-mini_nuclei.py"
    rows = [
        row("bccd/retinanet_r18_fpn_bccd.py"),
        row(name, 2, score=0.9, memory=7e8),
        row(name, 0, score=0.8),
        row("nuclei/upernet_pvtv2-b0_nuclei.py", score=0.95),
    ]
    page = tool.render(rows, times(name, 0.5, 1.0, 3.0))
    assert page.index("## Nuclei, UperNet") < page.index("## Blood cells, RetinaNet")
    assert "\na processor, 1 thread; torch 2.13.0; commit 0123456789ab.\n" in page
    header, _, first, second, other, *_ = lines(page)
    assert header[:5] == ["backbone", "params (M)", "seeds", "iterations", "mIoU"]
    assert first[:5] == ["PVTv2-B0", "3.00", "0", "10", "0.950"]
    assert second == [
        *("SOFT++ mini", "9.00", "0, 2", "10", "0.850 (0.800-0.900)"),
        *("1.00", "10", "700"),
    ]
    assert other[4] == "box AP"


def times(config, *seconds):
    return {config: dict(config=config, commit="c0ffee", seconds=seconds)}


def test_what_was_not_timed_in_turns_has_no_times(tool):
    names = [f"nuclei/upernet_{name}_nuclei.py" for name in ("softpp-mini", "pvtv2-b0")]
    page = tool.render(list(map(row, names)), times(names[0], 0.25))
    assert [line[5:7] for line in lines(page)[2:4]] == [["-", "-"], ["0.25", "2.50"]]
    page = tool.render(list(map(row, names)), times(names[1], 0.1, 0.2, 0.4, 0.3, 0.5))
    assert [line[5:7] for line in lines(page)[2:4]] == [["0.30 (0.15-0.45)", "3.00"], ["-", "-"]]
    assert "Times: commit c0ffee." in page


UNTIMED = {
    "nuclei/mask-rcnn_softpp-mini-default-norm_fpn_nuclei.py",
    "nuclei/upernet_softpp-mini-default-norm_nuclei.py",
    "bccd/retinanet_softpp-mini-default-norm_fpn_bccd.py",
}


def test_the_times_of_a_task_are_of_one_session(tool):
    """Ratios of seconds from two days are those of the days."""
    found = tool.times_by_config(tool.TIMES)
    sessions = {tool.task_of(each): each["session"] for each in found.values()}
    for each in found.values():
        assert each["session"] == sessions[tool.task_of(each)], each["name"]
        assert "dirty" not in each["commit"]
    rows = tool.read(tool.ROWS)
    assert {row["config"] for row in rows} - set(found) == UNTIMED


def test_configs_are_timed_in_turns(tool, tmp_path, monkeypatch, capsys):
    paths = [ROOT / f"configs/nuclei/upernet_{name}_nuclei.py" for name in ("softpp-mini", "r18")]
    runs = pretend_mim(monkeypatch)
    tool.time_configs(paths, tmp_path / "runs", tmp_path / "out", rounds=2, iterations=4)
    names = [path.stem for path in paths]
    assert [Path(run[2]).stem for run in runs] == [*names, *reversed(names)]
    found = tool.times_by_config(tmp_path / "out")
    assert found["nuclei/upernet_softpp-mini_nuclei.py"]["seconds"] == [1, 2, 4, 2]
    assert found["nuclei/upernet_r18_nuclei.py"]["seconds"] == [2, 2, 3, 2]
    assert found["nuclei/upernet_r18_nuclei.py"]["session"] == "upernet_nuclei"
    cells = ROOT / "configs/bccd/retinanet_r18_fpn_bccd.py"
    with pytest.raises(ValueError, match="must be of one task"):
        tool.time_configs([paths[0], cells], tmp_path / "more", tmp_path / "out", 2, 4)
    assert not (tmp_path / "more").exists()
    assert "r18_nuclei: 2.000 s, 500 iterations in the time" in capsys.readouterr().out


def test_losses_of_scheduled_runs_are_drawn(tool, tmp_path, monkeypatch):
    name = "nuclei/upernet_softpp-mini_nuclei.py"
    drawn = {}
    monkeypatch.setattr("mmsoft.visualization.draw_learning", lambda runs: drawn.update(runs))
    empty = Image.new("RGB", (4, 4))
    monkeypatch.setattr(
        "mmsoft.visualization.save_figure", lambda figure, path, colours: empty.save(path)
    )
    curve = tool.loss_curve([*4 * [dict(step=5, loss=2.00001)], dict(step=5, mIoU=3)])
    rows = [row(name, 0, loss=curve), row(name, 1), row(name, iterations=7, loss=[[5, 3.0]])]
    tool.draw(rows, tmp_path / "learning.png")
    assert drawn == {"Nuclei, UperNet": {"SOFT++ mini": dict(loss=[[[5, 2.0]]])}}
    assert "(real_data/learning.png)" in tool.render(rows, times(name, 1.0))
    assert "learning.png" not in tool.render(rows[1:2], {})


def test_rows_of_another_length_are_beside_ours_of_the_same_time(tool):
    names = [
        f"nuclei/upernet_{name}_nuclei.py"
        for name in ("softpp-mini", "softpp-t", "pvtv2-b0", "swin-t", "r18")
    ]
    found = {k: v for name, t in zip(names, (1, 3, 2, 4, 9)) for k, v in times(name, t).items()}
    rows = [*map(row, names), row(names[2], iterations=6), row(names[3], iterations=7)]
    page = tool.render(rows, found)
    same, mini, tiny = page.split("The same time")
    assert len(lines(same)) == 2 + len(names)
    assert "that of SOFT++ mini" in mini
    assert [(line[0], line[3], line[7]) for line in lines(mini)[2:]] == [
        ("PVTv2-B0", "6", "1.20"),
        ("SOFT++ mini", "10", "1.00"),
    ]
    assert "that of SOFT++ Tiny" in tiny
    assert [(line[0], line[3], line[7]) for line in lines(tiny)[2:]] == [
        ("Swin-T", "7", "0.93"),
        ("SOFT++ Tiny", "10", "1.00"),
    ]
    with pytest.raises(ValueError, match=f"seconds of {names[2]} or of ours were not measured"):
        tool.render(rows, {name: found[name] for name in names if name != names[2]})


def parts_of(**scores):
    return dict(
        all=dict(images=4, mIoU=0.5), **{k: dict(images=2, mIoU=v) for k, v in scores.items()}
    )


def test_where_peers_are_ahead_is_told_beyond_the_seeds(tool):
    ours, peer, other = (
        f"nuclei/upernet_{n}_nuclei.py" for n in ("softpp-mini", "pvtv2-b0", "r18")
    )
    rows = [
        row(ours, 0, score=0.80, where=parts_of(dark=0.7, bright=0.5)),
        row(ours, 1, score=0.82, where=parts_of(dark=0.8, bright=0.6)),
        row(peer, 0, score=0.81, where=parts_of(dark=0.75, bright=0.65)),
        row(peer, 1, score=0.84, where=parts_of(dark=0.85, bright=0.61)),
        row(other, 0, score=0.83, where=parts_of(dark=0.1, bright=0.1)),
    ]
    page = tool.render(rows, {})
    told = [line for line in page.splitlines() if line.startswith("- ") and ", here" in line]
    assert told == [
        "- PVTv2-B0: mIoU of bright 0.630 (0.610-0.650), here 0.550 (0.500-0.600)",
        "- ResNet-18: mIoU 0.830, here 0.810 (0.800-0.820)",
    ]
    tiny = row(ours.replace("mini", "t"), score=0.825)
    told = tool.ahead([*rows, tiny], "softpp-t").splitlines()
    assert [line for line in told if line.startswith("- ")] == [
        "- ResNet-18: mIoU 0.830, here 0.825"
    ]
    tie = row(ours.replace("mini", "t"), score=0.8298)  # of numbers of three digits
    assert "None is ahead" in tool.ahead([*rows, tie], "softpp-t")
    assert "| dark (2 images) |" in " ".join(page.split())
    behind = {**rows[4], "metrics": dict(mIoU=70)}
    assert "None is ahead of SOFT++ mini" in tool.render([*rows[:2], behind], {})


def test_objects_of_a_size_count_among_what_others_are_ahead_in(tool):
    config = "bccd/retinanet_softpp-mini_fpn_bccd.py"
    metrics = {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": 0.8, "coco/bbox_mAP_s": -1}
    assert tool.measures({**row(config), "metrics": metrics}) == {
        "box AP": 0.5,
        "box AP at IoU 0.5": 0.8,
    }


def test_where_the_classes_agree(tool, tmp_path):
    """A dark and a bright image, half of the first's nucleus and all of the second's found."""
    for folder in ("images", "masks", "found"):
        (tmp_path / folder).mkdir()
    for name, side, grey in (("a", 40, 20), ("b", 400, 200)):
        truth = np.zeros((side, side), np.uint8)
        truth[:, : side // 2] = 1
        found = truth.copy()
        if name == "a":
            found[: side // 2] = 0
        for folder, image in (
            ("images", np.full((side, side, 3), grey)),
            ("masks", truth),
            ("found", found),
        ):
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), image)
    (tmp_path / "images/left-out.png").touch()  # of an earlier conversion: not in the list
    (tmp_path / "val.txt").write_text("a\nb\n")
    dataset = dict(
        data_root=str(tmp_path),
        ann_file="val.txt",
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=("no", "yes")),
    )
    config = Config(dict(test_dataloader=dict(dataset=dataset)))
    where = tool.where_classes_agree(config, tmp_path / "found")
    half = (800 / 1200 + 400 / 800) / 2
    assert where["0 to 340"] == where["dark"] == dict(images=1, mIoU=round(half, 4))
    assert where["340 to 700"] == where["bright"] == dict(images=1, mIoU=1)
    both = (80_800 / 81_200 + 80_400 / 80_800) / 2  # pixels of both images together
    assert where["all"] == dict(images=2, mIoU=round(both, 4))
    assert "700 to inf" not in where


def test_images_where_another_run_is_ahead(tool, monkeypatch, tmp_path):
    """Those of the largest difference first; else from the first run's best to its worst."""
    scores = dict(a=(0.9, 0.8), b=(0.5, 0.9), c=(0.6, 0.7), d=(0.1, 0.1))
    drawn = []

    def tested(work_dir):
        which = ["one", "two"].index(work_dir.name)
        return {
            name: tool.Tested(tmp_path / "x.png", {}, {}, of[which], name)
            for name, of in scores.items()
        }

    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(tool, "tested", tested)
    monkeypatch.setattr(tool, "title_of", lambda work_dir: work_dir.name)
    monkeypatch.setattr("mmsoft.visualization.save_figure", lambda *_: None)
    monkeypatch.setattr(
        "mmsoft.visualization.draw_comparison",
        lambda rows, width: drawn.append([line for *_, line in rows]),
    )
    runs = [tmp_path / "one", tmp_path / "two"]
    tool.paint(runs, 2, [], 7, tmp_path / "out.png", behind=True)
    tool.paint(runs, 2, [], 7, tmp_path / "out.png")
    assert drawn == [["b: 0.50, 0.90", "c: 0.60, 0.70"], ["a: 0.90, 0.80", "d: 0.10, 0.10"]]


def test_the_largest_image_seed_by_seed(tool):
    rows = [
        dict(backbone="softpp-mini", budget=49, seed=seed, landmarks=had, segm=ap)
        for seed, had, ap in ((1, 38, 0.48), (0, 49, 0.03))
    ]
    rows.append(dict(backbone="pvtv2-b0", budget="-", seed=0, landmarks="-", segm=0.2))
    assert lines(tool.of_largest(rows))[2:] == [
        ["SOFT++ mini", "49", "49, 38", "0.030, 0.480"],
        ["PVTv2-B0", "-", "-", "0.200"],
    ]


def test_budgets_that_were_collected_twice_are_refused(tool, tmp_path):
    path, row = tmp_path / "budgets.json", dict(budget=49, seed=0, model="by content")
    path.write_text(json.dumps([row, row | dict(budget="all"), row]))
    with pytest.raises(ValueError, match=r"budget and seed \(49, 0\) more than once"):
        tool.read_budgets(path)
    path.write_text(json.dumps([row, row | dict(seed=1, model="released")]))
    with pytest.raises(ValueError, match="several kinds of landmarks"):
        tool.read_budgets(path)


@pytest.mark.parametrize("masks", [False, True])
def test_what_a_detector_found_on_an_image(tool, tmp_path, masks):
    """One of two objects found, another at a score too low to be painted, a third in vain."""
    boxes = {1: (2, 3, 4, 5), 2: (10, 8, 6, 4)}  # by annotation: x, y, width, height
    areas = {}
    for number, (x, y, w, h) in boxes.items():
        areas[number] = np.zeros((20, 30), np.uint8, order="F")
        areas[number][y : y + h, x : x + w] = 1
    coded = {n: mask.encode(area) for n, area in areas.items()}
    annotations = [
        dict(id=n, image_id=7, category_id=30 + n, bbox=box, area=box[2] * box[3], iscrowd=0)
        | dict(segmentation=dict(coded[n], counts=coded[n]["counts"].decode()))
        for n, box in boxes.items()
    ]
    image = dict(id=7, file_name="cells.png", height=20, width=30)
    categories = [dict(id=31, name="white"), dict(id=32, name="red")]
    content = dict(images=[image], annotations=annotations, categories=categories)
    (tmp_path / "truth.json").write_text(json.dumps(content))
    corners = [(x, y, x + w, y + h) for x, y, w, h in (boxes[1], boxes[2], (0, 0, 3, 3))]
    found = dict(
        bboxes=np.array(corners, float),
        scores=np.array([0.9, 0.3, 0.5]),
        labels=np.array([1, 0, 0]),  # in the order of the classes below, not of the file
    )
    if masks:
        found["masks"] = [coded[1], coded[2], mask.encode(np.asfortranarray(areas[1] * 0))]
    dump([dict(img_id=7, pred_instances=found)], tmp_path / "predictions.pkl")
    dataset = dict(
        data_root="root", data_prefix=dict(img="images/"), metainfo=dict(classes=("red", "white"))
    )
    evaluator = dict(ann_file=str(tmp_path / "truth.json"))
    config = Config(dict(test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))
    ((name, image),) = tool.detected(config, tmp_path)
    assert (name, image.path) == ("cells", Path("root/images/cells.png"))
    assert image.about == "cells, 30x20, 2 objects"
    assert image.score == pytest.approx((1 + 0.5) / 2, abs=0.01)  # red only after one in vain
    if masks:
        assert image.truth["kind"] == image.found["kind"] == "instances"
        np.testing.assert_array_equal(image.truth["masks"], [areas[1], areas[2]])
        np.testing.assert_array_equal(image.found["masks"], [areas[1], areas[1] * 0])
    else:
        assert (image.truth["boxes"], image.truth["labels"]) == (corners[:2], [1, 0])
        np.testing.assert_array_equal(image.found["boxes"], [corners[0], corners[2]])
        np.testing.assert_array_equal(image.found["labels"], [1, 0])


def test_budgets_across_sizes(tool):
    name = "nuclei/mask-rcnn_{}_fpn_nuclei.py"
    budgets = [
        {"budget": most, "seed": seed, "landmarks": had, "segm 0 to 340": ap, "bbox 0 to 340": 0}
        for most, seed, had, ap in ((49, 0, 41, 0.1), (49, 1, 46, 0.3), ("all", 0, 41, 0.4))
    ]
    where = {"all": dict(images=1, segm=0.9), "0 to 340": dict(images=1, segm=0.25)}
    rows = [
        row(name.format("softpp-mini"), where=where),
        row(name.format("softpp-mini-no-attention"), 3, where=where),
    ]
    page = tool.render(rows, {}, budgets)
    table = lines(page.partition("### Across sizes of images")[2])
    assert table[0][3] == "segm 0 to 340"
    assert table[2:5] == [
        ["49", "0, 1", "46", "0.200 (0.100-0.300)"],
        ["all", "0", "41", "0.400"],
        ["trained without attention", "3", "-", "0.250"],
    ]


def test_a_curve_ends_with_a_whole_mean(tool):
    assert tool.smooth([[n, n] for n in range(1, 11)]) == [[4, 2.5], [8, 6.5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not of real_data.py"),
        ("[]", "lacks config, seed"),
        (json.dumps(row("nuclei/x_y_z.py")), "of no known task"),
    ],
)
def test_what_is_no_row_is_named(tool, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=rf"bad.json .*{message}"):
        tool.read(tmp_path)


# ------------------------------------------------------------------------------------ training


def draw_nuclei(folder, name, rng, size=(256, 256)):
    """One image of bright discs in the layout of the original repository."""
    image = np.full((*size, 4), 20, np.uint8)
    image[..., 3] = 255
    (folder / name / "images").mkdir(parents=True)
    (folder / name / "masks").mkdir()
    for number in range(6):
        mask = np.zeros(size, np.uint8)
        centre = 40 * (number % 3) + 60, 80 * (number // 3) + 60
        cv2.circle(mask, centre, int(rng.integers(8, 18)), 255, -1)
        image[mask > 0, :3] = 180
        cv2.imwrite(str(folder / name / f"masks/{number}.png"), mask)
    cv2.imwrite(str(folder / name / f"images/{name}.png"), image)


def draw_cells(root, names):
    """Images of two cells in the layout of the original repository."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    for name in names:
        image = np.full((480, 640, 3), 220, np.uint8)
        cv2.circle(image, (200, 200), 50, (60, 60, 200), -1)
        cv2.circle(image, (400, 300), 90, (160, 40, 90), -1)
        cv2.imwrite(str(root / f"JPEGImages/{name}.jpg"), image)
        cells = ("RBC", 150, 150, 250, 250), ("WBC", 310, 210, 490, 390)
        xml = "".join(f"<object><name>{c}</name>{box.format(*b)}</object>" for c, *b in cells)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    for split, part in (("train", names[2:]), ("val", names[:1]), ("test", names[1:2])):
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(part))


@pytest.fixture
def drawn(run_tool, tmp_path):
    """A folder whose data/ has a handful of drawn images, converted."""
    rng = np.random.default_rng(0)
    nuclei = load_tool("dataset_converters/nuclei.py")
    validation = next(
        n for n, of in nuclei.published().items() if of.split == "val" and of.masks < 6
    )
    for name in ("a", "b", validation):
        # One has another size than the crops, and is not a multiple of 32.
        size = (260, 300) if name == validation else (256, 256)
        draw_nuclei(tmp_path / "nuclei/stage1_train", name, rng, size)
    draw_cells(tmp_path / "cells/BCCD", list("abcd"))
    for converter, source in (("nuclei", "nuclei"), ("bccd", "cells")):
        status, _, error = run_tool(
            f"dataset_converters/{converter}.py", tmp_path / source, tmp_path / "data" / converter
        )
        assert status == 0, error
    return tmp_path


def run_row(run_outside, tmp_path, config, iterations):
    tool = ROOT / "tools/dev/real_data.py"
    options = ["--iters", iterations, "--seed", 1, "--work-dir", "work", "--out", "rows"]
    done = run_outside(tool, "run", ROOT / "configs" / config, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "rows").iterdir()
    assert path.name == f"{Path(config).stem}_{iterations}-iterations_seed1.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", MINI)
@pytest.mark.long
def test_a_row_from_drawn_images(tool, drawn, run_outside, name):
    found = run_row(run_outside, drawn, MINI[name], 2)
    detects = name != "upernet"
    assert set(found) == {*tool.FIELDS, "digest", "wall_seconds", "loss", "where"}
    assert found["digest"] == digest(Config.fromfile(ROOT / "configs" / MINI[name]))
    parts = ["RBC", "WBC", "Platelets"] if name == "retinanet" else ["0 to 340"]
    assert list(found["where"])[: len(parts) + 1] == ["all", *parts]
    if not detects:  # the stock metric and ours count alike
        assert found["metrics"]["mIoU"] == pytest.approx(
            100 * found["where"]["all"]["mIoU"], abs=0.01
        )
    sheet = ["draw", "work", "--number", 1, "--out", "sheet.png"]
    done = run_outside(ROOT / "tools/dev/real_data.py", *sheet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (drawn / "sheet.png").stat().st_size > 10_000
    assert found["iterations"] == 2
    assert found["seed"] == 1
    assert found["parameters"] > 8e5
    assert 1e8 < found["peak_bytes"] < 8e9
    assert tool.task_of(found) in tool.TASKS
    assert set(found["metrics"]) & set(tool.METRICS)
    scheduled = found | dict(iterations=found["scheduled_iterations"])
    assert tool.render([scheduled], {}).count("\n| SOFT++ mini ") == 2  # where it is right, too
    trained = Config.fromfile(min(drawn.glob("work/*/vis_data/config.py")))
    assert trained.randomness.seed == 1
    assert trained.param_scheduler[-1].end == trained.train_cfg.max_iters == 2
    assert "val_cfg" not in trained or trained.val_cfg is None


STEP = """
import sys
from mmengine import dump
from mmengine.config import Config

from mmengine.runner import Runner

for path in sys.argv[1:]:
    config = Config.fromfile(path)
    config.work_dir = "work"
    config.train_cfg.max_iters = 1
    config.param_scheduler = None
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    runner = Runner.from_cfg(config)
    runner.train()
    print("trained", runner.iter)
    runner.test()
"""


@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_drawn_images_are_converted_trained_on_and_tested(drawn, run_outside, package):
    """One iteration, and the validation images, of each of a library's small models."""
    pytest.importorskip(package)
    names = ["upernet"] if package == "mmseg" else ["mask_rcnn", "retinanet"]
    paths = [ROOT / "configs" / MINI[name] for name in names]
    done = run_outside("-W", "ignore", "-c", STEP, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\ntrained 1\n") == len(names)


# --------------------------------------------------------------------------------- the archives


def unpack(archive, folder):
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def split_is_as_published(folder):
    """Of the images of each size, by name, the third and every fifth after it."""
    sizes, validation = {}, set()
    for split in ("train", "val"):
        images = json.loads((folder / f"instances_{split}.json").read_text())["images"]
        for image in images:
            sizes.setdefault((image["width"], image["height"]), []).append(image["file_name"])
        validation = {image["file_name"] for image in images}
    assert validation == {name for names in sizes.values() for name in sorted(names)[2::5]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("converter", "archive", "names", "expected"),
    [
        (
            "nuclei",
            "dsb2018.tar",
            ["mask_rcnn", "upernet"],
            dict(train=(531, 22942), val=(133, 6044)),
        ),
        (
            "bccd",
            "bccd.tar",
            ["retinanet"],
            dict(train=(205, 2804), val=(87, 1137), test=(72, 945)),
        ),
    ],
)
def test_the_archives_are_converted_and_trained_on(
    tool, tmp_path, converter, archive, names, expected
):
    unpack(ARCHIVES / archive, tmp_path / "raw")
    script = ROOT / f"tools/dataset_converters/{converter}.py"
    command = [
        sys.executable,
        str(script),
        str(tmp_path / "raw"),
        str(tmp_path / "data" / converter),
    ]
    subprocess.run(command, check=True, capture_output=True)
    for split, counts in expected.items():
        path = tmp_path / f"data/{converter}/annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        assert (len(content["images"]), len(content["annotations"])) == counts
    if converter == "nuclei":
        split_is_as_published(tmp_path / "data/nuclei/annotations")
    for name in names:
        package = "mmseg" if name == "upernet" else "mmdet"
        config, work = str(ROOT / "configs" / MINI[name]), f"work_{name}"
        changes = ["train_cfg.max_iters=20", "param_scheduler=None", *tool.NO_VALIDATION]
        options = ["--gpus", "0", "--work-dir", work, "--cfg-options", *changes]
        mim(name, ["train", package, config, *options], tmp_path / f"{name}.log", tmp_path)
        first, last = (entry for entry in read_scalars(tmp_path / work) if "loss" in entry)
        assert last["step"] == 20
        assert 0 < last["loss"] < first["loss"]
