"""Figures show the given numbers, and files have the documented size."""

import sys

import cv2
import numpy as np
import pytest

from mmsoft.visualization import (
    draw_attention,
    draw_budgets,
    draw_comparison,
    draw_convergence,
    draw_landmarks,
    draw_learning,
    draw_memory,
    draw_predictions,
    draw_spectrum,
    draw_tradeoff,
    save_figure,
)
from mmsoft.visualization.style import DPI

pytest.importorskip("matplotlib")

PICTURE = np.zeros((60, 80, 3), np.uint8)
EXTENT = (-0.5, 79.5, 59.5, -0.5)
RNG = np.random.default_rng(0)
OPERATORS = [
    dict(name=name, tokens=tokens, peak_mib=tokens * scale)
    for name, scale in (("SOFT", 0.01), ("softmax", 0.1))
    for tokens in (1024, 256, 4096)
] + [dict(name="softmax", tokens=65536, peak_mib=None)]  # out of memory
RESULTS = [
    dict(backbone=f"{family}-{size}", images_per_second=100 / n, params_m=13.0 * n)
    for family in ("soft", "softpp")
    for n, size in enumerate(("tiny", "small", "large"), 1)
]
ACCURACIES = {"soft-tiny": 70.0, "soft-small": 80.0, "softpp-tiny": 75.0}  # invented


def attention():
    maps = {"head 0": RNG.random((2, 6, 8)), "mean": RNG.random((2, 6, 8)) - 0.5}
    return draw_attention(PICTURE, [(10, 20), (70, 50)], maps, EXTENT, "title")


def convergence():
    values = {"ours": RNG.random((21, 9)), "released": RNG.random((21, 9))}
    values["ours"][-1, 0] = np.inf
    return draw_convergence({"stage 0": values, "stage 1": values})


def landmarks():
    regions = RNG.integers(0, 5, (6, 8))
    return draw_landmarks(PICTURE, regions, RNG.random((6, 8)), RNG.random((7, 2)) * 6, EXTENT)


def spectrum():
    x = np.geomspace(1e-6, 10, 50)
    return draw_spectrum(RNG.random((2, 9)), x, np.stack([x / (x**2 + 1e-4)] * 2))


def memory():
    return draw_memory(OPERATORS)


def tradeoff():
    return draw_tradeoff(RESULTS, ACCURACIES)


def budgets():
    found = [(32, 49, 90.0), (32, 49, 80.0), (64, 49, 70.0), (64, "all", 60.0)]
    rows = [dict(size=[n, n], budget=most, mIoU=miou) for n, most, miou in found]
    return draw_budgets(
        [
            row | model
            for row in rows
            for model in (dict(model="a", solver="none"), dict(model="b", solver="direct"))
        ]
    )


FIGURES = (attention, budgets, convergence, landmarks, spectrum, memory, tradeoff)


@pytest.mark.parametrize("draw", FIGURES)
def test_axes_are_labelled_and_files_have_the_documented_size(draw, tmp_path):
    figure = draw()
    grid = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert any(axes.get_ylabel() for axes in grid)
    assert any(axes.get_xlabel() for axes in grid)
    assert all(axes.get_ylabel() for axes in figure.axes if axes not in grid)
    path = save_figure(figure, tmp_path / "new" / "figure.png")
    picture = cv2.imread(str(path))
    width, height = figure.get_size_inches() * DPI
    assert picture.shape == (int(height), int(width), 3)
    assert picture.std() > 10
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_attention_sheet_has_a_row_for_each_query_and_shows_shares_of_the_largest():
    figure = attention()
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == 2 * 3
    images = [ax.images[-1].get_array() for ax in panels if len(ax.images) == 2]
    assert len(images) == 4
    assert all(image.min() >= 0 and image.max() == 1 for image in images)


def test_convergence_draws_mean_and_band():
    values = RNG.random((6, 50))
    (ax,) = draw_convergence({"stage 0": {"ours": values}}).axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values.mean(1))
    (band,) = ax.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert y.min() == pytest.approx(np.quantile(values, 0.1, axis=1).min())
    assert y.max() == pytest.approx(np.quantile(values, 0.9, axis=1).max())


def test_memory_and_tradeoff_draw_what_was_measured():
    (ax,) = memory().axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["SOFT"] == [[256, 2.56], [1024, 10.24], [4096, 40.96]]
    assert len(lines["softmax"]) == 3
    (ax,) = draw_memory(OPERATORS, styles={"softmax": ("#0072B2", "v", ":")}).axes
    looks = {line.get_label(): (line.get_color(), line.get_marker()) for line in ax.lines}
    assert looks == {"SOFT": ("#0072B2", "o"), "softmax": ("#0072B2", "v")}
    left, right = tradeoff().axes
    assert "published" in left.get_ylabel()
    assert left.lines[0].get_xydata().tolist() == [[50, 80.0], [100, 70.0]]
    assert right.lines[1].get_xydata().tolist() == [[13.0, 75.0]]


def test_seeds_are_a_mean_with_their_range_where_iterations_agree():
    runs = {
        "task": {
            "ours": dict(loss=[[(1, 2.0), (2, 1.0)], [(1, 4.0), (2, 2.0)]]),
            "peer": dict(loss=[[(1, 3.0)], [(2, 1.0)]]),
        }
    }
    figure = draw_learning(runs)
    (ax,) = figure.axes
    ours, *peer = (line.get_xydata().tolist() for line in ax.lines)
    assert ours == [[1, 3.0], [2, 1.5]]
    assert peer == [[[1, 3.0]], [[2, 1.0]]]
    (band,) = ax.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 2.0), (1, 4.0), (2, 1.0), (2, 2.0)}
    (legend,) = figure.legends  # beside the curves, not over them
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "peer"]


def test_a_legend_of_long_names_is_within_the_figure():
    names = [f"a backbone with a long name, number {n}" for n in range(4)]
    figure = draw_learning({"task": {name: dict(loss=[[(1, 2.0), (2, 1.0)]]) for name in names}})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == names


def test_the_tradeoff_has_intervals_and_names_that_cover_nothing():
    results = [
        dict(backbone=f"{family}-{size}", label=f"{family} {size}", params_m=10.0 + n / 10)
        | dict(images_per_second=10.0, median_ms=100.0, min_ms=80.0, q90_ms=125.0)
        for n, (family, size) in enumerate((f, s) for f in "AB" for s in ("Tiny", "Small"))
    ]
    accuracies = {r["backbone"]: 80.0 + 0.1 * n for n, r in enumerate(results)}
    results.append({**results[0], "backbone": "D", "label": "D Far", "params_m": 90.0})
    accuracies["D"] = 60.0  # so that the others are close to each other
    from matplotlib.text import Text

    figure = draw_tradeoff(results, accuracies)
    figure.draw_without_rendering()
    left, right = figure.axes
    (path, *_) = left.collections[0].get_paths()
    assert path.vertices[:, 0].tolist() == [8.0, 12.5]
    assert not right.collections
    assert left.get_legend_handles_labels()[1] == ["A", "B", "D"]
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["Tiny", "Small", "Tiny", "Small", "Far"]
        # Of the words, without the line to the point.
        boxes = [Text.get_window_extent(text).shrunk(0.8, 0.8) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        points = axes.transData.transform(np.concatenate([x.get_xydata() for x in axes.lines]))
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_budgets_draw_means_and_ranges_of_the_seeds():
    left, right = budgets().axes
    assert (left.get_title(), right.get_title()) == ("a", "b, direct")
    assert [label.get_text() for label in left.get_xticklabels()] == ["32 x 32", "64 x 64"]
    first, second = left.containers
    assert (first.get_label(), second.get_label()) == ("49", "all")
    assert first.lines[0].get_ydata().tolist() == [85, 70]
    assert second.lines[0].get_ydata().tolist() == [60]
    ends = [path.vertices[:, 1].tolist() for path in first.lines[2][0].get_paths()]
    assert ends == [[80, 90], [70, 70]]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="there are no rows to draw"):
        draw_budgets([])
    with pytest.raises(ValueError, match="no entry under 'operator' has a peak_mib"):
        draw_memory(OPERATORS[-1:])
    with pytest.raises(ValueError, match="no backbone under 'results' has a published accuracy"):
        draw_tradeoff(RESULTS, {})


def test_a_png_of_few_colours_is_the_same_picture(tmp_path):
    paths = [tmp_path / "all.png", tmp_path / "few.png"]
    for path, colours in zip(paths, (None, 64)):
        save_figure(memory(), path, colours)
    whole, few = (cv2.imread(str(path)).astype(int) for path in paths)
    assert whole.shape == few.shape
    assert np.abs(whole - few).mean() < 1
    assert len(np.unique(few.reshape(-1, 3), axis=0)) <= 64
    assert paths[1].stat().st_size < paths[0].stat().st_size


def test_an_unknown_suffix_or_a_failure_leaves_no_file(tmp_path, monkeypatch):
    figure = memory()
    with pytest.raises(ValueError, match=r"figure\.gif2 must end in one of .*png"):
        save_figure(figure, tmp_path / "figure.gif2")

    def fail(path, **_):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        memory()


def found(kind):
    """Two objects, the second in the right half."""
    masks = np.zeros((2, *PICTURE.shape[:2]), bool)
    masks[0, :10, :10] = masks[1, 40:, 60:] = True
    names = ("zero", "one")
    return {
        "boxes": dict(boxes=[(0, 0, 9, 9), (60, 40, 79, 59)], labels=[0, 1], scores=[0.9, 0.5]),
        "instances": dict(masks=masks),
        "classes": dict(map=masks[1].astype(int)),
        "scores": dict(labels=[1, 0], scores=[0.7, 0.3]),
    }[kind] | dict(kind=kind, names=names)


@pytest.mark.parametrize("kind", ["boxes", "instances", "classes", "scores"])
def test_predictions_are_painted_where_they_are(kind):
    """The panel of the truth differs from the empty one at the objects alone."""
    figure = draw_predictions(PICTURE, found(kind))
    words = " ".join(
        text.get_text() for text in figure.findobj(match=lambda o: hasattr(o, "get_text"))
    )
    assert ("one 0.50" in words) == (kind == "boxes")
    assert ("one 0.70" in words) == (kind == "scores")
    assert ("one" in words) == (kind != "instances")
    (shown,) = figure.axes[0].images[-1:]
    painted = np.asarray(shown.get_array(), float)[..., :3].sum(-1) > 0
    expected = {
        "instances": [True, True, False],
        "classes": [True, True, True],  # every pixel has a class
    }.get(kind, [False] * 3)
    assert [bool(painted[y, x]) for y, x in ((5, 5), (50, 70), (30, 30))] == expected


def test_comparisons_have_a_row_for_each_image():
    wide = np.zeros((30, 90, 3), np.uint8)
    boxes = found("boxes")
    rows = [
        (PICTURE, dict(truth=boxes, ours=boxes), "first"),
        (wide, dict(truth=boxes, ours=boxes), ""),
    ]
    figure = draw_comparison(rows)
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "truth", "ours"]
    assert [len(axes.lines) for axes in figure.axes[1:3]] == [2, 2]
    assert figure.axes[0].get_xlabel() == "first"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["zero", "one"]
    assert not draw_comparison([(PICTURE, dict(a=found("instances")), "")]).legends
    for wrong in ([], [rows[0], (wide, dict(truth=boxes), "")]):
        with pytest.raises(ValueError, match="all of the same columns"):
            draw_comparison(wrong)
