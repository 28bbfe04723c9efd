"""The generators of ListOps and Pathfinder: what they write has the published distribution."""

import hashlib
import re
import statistics
from collections import Counter
from contextlib import suppress

import cv2
import numpy as np
import pytest
from loading import load_tool

from mmsoft.datasets import ListOps, Pathfinder32


@pytest.fixture(scope="module")
def listops():
    return load_tool("dataset_converters/make_listops.py")


@pytest.fixture(scope="module")
def pathfinder():
    return load_tool("dataset_converters/make_pathfinder.py")


def evaluate(source):
    """The value of an expression in Python's words, independently of how it was drawn."""
    tokens, stack = source.replace("(", "").replace(")", "").split(), [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token])
        elif token == "]":
            name, *values = stack.pop()
            assert 2 <= len(values) <= 10
            value = {
                "[MIN": lambda v: min(v),
                "[MAX": lambda v: max(v),
                "[MED": lambda v: int(np.median(v)),
                "[SM": lambda v: sum(v) % 10,
            }[name](values)
            stack[-1].append(value)
        else:
            stack[-1].append(int(token))
    ((value,),) = stack
    return value, len(tokens)


def depth(source):
    return max(np.cumsum([(t[0] == "[") - (t == "]") for t in re.findall(r"\S+", source)]))


@pytest.fixture(scope="module")
def expressions(listops):
    found = listops.expressions(0, 500, 2000)
    return [next(found) for _ in range(1000)]


def test_expressions_have_their_values_and_lengths(expressions):
    """Mean length 1040, as in the published data (standard error of this sample: 13)."""
    lengths = []
    for source, value in expressions:
        found, length = evaluate(source)
        assert found == value
        assert 500 < length < 2000
        lengths.append(length)
        # pairs: as many opening as closing, one pair for each argument and two more a list
        assert source.count("(") == source.count(")")
        assert depth(source) <= 9
    assert statistics.mean(lengths) == pytest.approx(1040, abs=40)
    assert len({source for source, _ in expressions}) == len(expressions)


def test_operators_digits_and_arguments_are_as_often_as_published(expressions):
    tokens = Counter(t for source, _ in expressions for t in source.split() if t not in "()")
    operators = [tokens[name] for name in ("[MIN", "[MAX", "[MED", "[SM")]
    digits = [tokens[str(digit)] for digit in range(10)]
    assert tokens["]"] == sum(operators)
    assert [n / sum(operators) for n in operators] == pytest.approx([0.25] * 4, abs=0.01)
    assert [n / sum(digits) for n in digits] == pytest.approx([0.1] * 10, abs=0.005)
    # Every expression but the root is an argument: (operators - 1 + digits) / operators. It is 6 of
    # all drawn; long ones have more.
    arguments = (sum(operators) - len(expressions) + sum(digits)) / sum(operators)
    assert 6 < arguments < 6.6


# Of 30 000 expressions by the published rule, computed without this program.
FREQUENCIES = (0.172, 0.090, 0.078, 0.083, 0.088, 0.086, 0.077, 0.072, 0.088, 0.166)


def test_labels_are_as_often_as_published(expressions):
    """Chi-squared is below what one sample of 10 000 exceeds; that of equal labels would be 125."""
    labels = Counter(value for _, value in expressions)
    expected = {label: len(expressions) * share for label, share in enumerate(FREQUENCIES)}
    assert sum((labels[k] - n) ** 2 / n for k, n in expected.items()) < 33.7


def test_one_in_twelve_is_long_enough(listops):
    """8 % of the trees are accepted, as was counted for the published program."""
    rng = listops.random.Random(0)
    kept = 0
    for _ in range(4000):
        with suppress(listops.TooLongError):
            kept += listops.expression(rng, 1999)[2] > 500
    assert kept / 4000 == pytest.approx(0.08, abs=0.015)


def test_the_same_parameters_give_the_same_expressions(listops):
    """Those of version 1, whose rows stand in a table: others are another version."""
    found = listops.expressions(0, 500, 2000)
    text = "".join(f"{source}{value}" for source, value in (next(found) for _ in range(20)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert (listops.VERSION, digest) == (1, "3d87c9219ae3")


def test_median_is_cut_to_an_integer(listops):
    assert [listops.median(v) for v in ([3, 1, 2], [1, 4], [9, 0, 1, 2], [5, 6])] == [2, 2, 1, 5]


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
    tool.main()


def test_listops_files(listops, tmp_path, monkeypatch, capsys):
    sizes = ("--train", 20, "--val", 5, "--test", 4)
    lengths = ("--min-length", 20, "--max-length", 100)
    run(listops, monkeypatch, tmp_path / "d", *sizes, *lengths)
    for split, size in (("train", 20), ("val", 5), ("test", 4)):
        data = ListOps(tmp_path / "d", split)
        assert len(data) == size
        assert all(20 < len(data[i]["tokens"]) < 100 for i in range(size))
    first = (tmp_path / "d/basic_train.tsv").read_bytes()
    run(listops, monkeypatch, tmp_path / "d", *sizes, *lengths)
    assert "complete already, kept" in capsys.readouterr().out
    run(listops, monkeypatch, tmp_path / "again", *sizes, *lengths)
    assert (tmp_path / "again/basic_train.tsv").read_bytes() == first
    run(listops, monkeypatch, tmp_path / "other", *sizes, *lengths, "--seed", 1)
    assert (tmp_path / "other/basic_train.tsv").read_bytes() != first
    with pytest.raises(SystemExit, match=r"exists and is not this data set \(other parameters"):
        run(listops, monkeypatch, tmp_path / "d", *sizes)
    with pytest.raises(SystemExit):
        run(listops, monkeypatch, tmp_path / "e", "--max-length", 505)
    assert not (tmp_path / "e").exists()


def test_an_interrupted_run_leaves_nothing(listops, tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "track", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(listops, monkeypatch, tmp_path / "d", "--train", 3)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- pathfinder


@pytest.fixture(scope="module")
def drawn(pathfinder):
    """Contours ``[n, 2, 14, 3, 2]``, distractors ``[n, 5, 4, 3, 2]``, which of them there are."""
    both, field = pathfinder.contours(np.random.default_rng(0), 2048)
    return both, *pathfinder.distractors(np.random.default_rng(1), field)


def directions(dashes):
    return (dashes[..., 2, :] - dashes[..., 0, :]) / 2


def assert_bends_are_in_the_middle_of_gaps(dashes):
    """The published step: from a dash's end a margin on, turn, and begin a margin from there."""
    direction = directions(dashes)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1)
    after = dashes[..., :-1, 2, :] + direction[..., :-1, :]
    before = dashes[..., 1:, 0, :] - direction[..., 1:, :]
    np.testing.assert_allclose(after, before)


def test_dashes_keep_their_distances(drawn):
    """As published: dashes of 2, margins of 1, 14 and 4 in a row, beginnings 7 apart."""
    both, short, there = drawn
    assert len(both) > 20
    assert both.shape[1:] == (2, 14, 3, 2)
    assert short.shape[1:] == (5, 4, 3, 2)
    assert_bends_are_in_the_middle_of_gaps(both)
    assert_bends_are_in_the_middle_of_gaps(short[there])
    begin = np.linalg.norm(both[:, 0, 0, 0] - both[:, 1, 0, 0], axis=-1)
    np.testing.assert_allclose(begin, 7)
    for dashes in (both, short[there]):  # a margin from the border of 1
        assert dashes.min() >= 2
        assert dashes.max() <= 30
    # 1.5 or more; places are known to half a pixel.
    between = both[:, 0].reshape(len(both), -1, 1, 2) - both[:, 1].reshape(len(both), 1, -1, 2)
    assert np.linalg.norm(between, axis=-1).min() > 1
    between = both.reshape(len(both), 1, -1, 2) - short[:, 0].reshape(len(both), -1, 1, 2)
    assert np.linalg.norm(between[there[:, 0]], axis=-1).min() > 1


def test_as_many_distractors_find_room_as_published(drawn):
    """By the published rules 4.57 of 5, of 167 pictures drawn without this program."""
    there = drawn[2]
    assert len(there) > 50
    assert there.sum(1).mean() == pytest.approx(4.57, abs=0.35)


def test_turns_are_continuous(pathfinder, drawn):
    """Turns by x are as frequent as cos(x)^2: their mean cosine is 8 / (3 pi) where all is free."""
    n, rng = 4000, np.random.default_rng(1)
    angle = rng.uniform(-np.pi, np.pi, n)
    last = pathfinder.dash(np.full((n, 2), 16.0), angle)
    rows = np.arange(n)
    _, new, room = pathfinder.extend(rng, pathfinder.Fields(n), rows, last, angle)
    assert room.all()
    # The standard deviation of the cosine is 0.17.
    assert np.cos(new - angle).mean() == pytest.approx(8 / (3 * np.pi), abs=4 * 0.17 / n**0.5)
    direction = directions(drawn[0])
    assert (direction[:, :, 1:] * direction[:, :, :-1]).sum(-1).min() > 0


def test_distractors_are_brighter(pathfinder):
    """As published: 2 to the discs' 1, and contours 0.75 of that."""
    right, down = (np.array([[[0, 0], [y, x], [2 * y, 2 * x]]]) for y, x in ((0, 1), (1, 0)))
    for dash in (right, down):
        image = pathfinder.draw(dash + 4.25, dash + 20.25, np.array([[27, 5], [5, 27]]))
        long, short = image[:12, :12].max(), image[16:24, 16:24].max()
        assert long / short == pytest.approx(0.75, abs=0.005)
        disc = image[24:, :12].astype(int)  # 32 quarters of a pixel lie within 1.5 pixels
        assert disc.sum() / disc.max() == pytest.approx(8, abs=0.05)
        coverage = pathfinder.lines(dash + 20.25).max()
        assert short / image[24:, :12].max() == pytest.approx(2 * coverage, abs=0.01)


def test_discs_are_at_the_ends_of_one_contour_or_of_two(pathfinder, monkeypatch):
    drawn = []
    monkeypatch.setattr(pathfinder, "draw", lambda *picture: drawn.append(picture))
    found = pathfinder.pictures(np.random.default_rng(0))
    labels = [next(found)[1] for _ in range(600)]
    assert np.mean(labels) == pytest.approx(0.5, abs=0.08)
    for label, (long, short, discs) in zip(labels, drawn):
        assert long.shape == (28, 3, 2)
        begins = [np.allclose(long[14 * i, 0], discs[0]) for i in (0, 1)]
        ends = [np.allclose(long[14 * i + 13, -1], discs[1]) for i in (0, 1)]
        assert sorted(begins) == sorted(ends) == [False, True]
        assert (begins == ends) is bool(label)
        assert len(short) in range(0, 21, 4)


def test_pictures(pathfinder, tmp_path, monkeypatch):
    run(pathfinder, monkeypatch, tmp_path / "d", "--train", 40, "--val", 3, "--test", 2)
    data = Pathfinder32(tmp_path / "d", "train")
    assert len(data) == 40
    for i in range(40):
        image = (data[i]["tokens"].numpy() - 1).astype(np.uint8).reshape(32, 32)
        assert image.max() == 255
        assert 0.5 < (image == 0).mean() < 0.9
        bright = cv2.erode((image > 170).astype(np.uint8), np.ones((2, 2), np.uint8))
        assert 2 <= cv2.connectedComponents(bright)[0] <= 3  # the background, discs that may touch
    run(pathfinder, monkeypatch, tmp_path / "e", "--train", 40, "--val", 3, "--test", 2)
    again = Pathfinder32(tmp_path / "e", "train")
    assert all(data[i]["tokens"].equal(again[i]["tokens"]) for i in range(40))
    # Others mean that a folder of before is not what the same parameters give now.
    means = [float(data[i]["tokens"].double().mean()) for i in range(4)]
    assert pathfinder.VERSION == 2
    assert means == pytest.approx([22.02, 22.34, 23.90, 21.82], abs=0.05)
