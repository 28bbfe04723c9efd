"""Times of configs that take turns, and how tables say them."""

from pathlib import Path

import pytest
from pretended_mim import pretend_mim

from mmsoft.commands import CommandError
from mmsoft.rows import Subject, read_times, seconds_of, time_in_turns

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/lra/softpp_listops.py"


def subjects():
    none = ["model.backbone.attention=none"]
    return [Subject("a", CONFIG), Subject("b", CONFIG, none, dict(attention="none"))]


def test_neighbours_change_and_a_round_has_one_seed(tmp_path, monkeypatch):
    runs = pretend_mim(monkeypatch)
    paths = (tmp_path / "runs", tmp_path / "out/a.json")
    samples = time_in_turns(
        subjects(), *paths, rounds=3, iterations=4, root=ROOT, packages=["torch"]
    )
    assert samples == [[1, 2, 4, 2, 5, 2], [2, 2, 3, 2, 6, 2]]  # without the first two of each
    said = [[word for word in run if word.startswith("randomness")] for run in runs]
    assert said == [[f"randomness.seed={seed}"] for seed in (0, 0, 1, 1, 2, 2)]
    for number, run in enumerate(runs):
        assert ("model.backbone.attention=none" in run) == (number in (1, 2, 5))
        assert "train_cfg.max_iters=4" in run
        assert "log_processor.window_size=1" in run  # or each is a mean with the warm-up
    first, second = read_times(tmp_path / "out", "a tool", lambda each: None)
    assert "attention" not in first
    assert second["attention"] == "none"
    assert first["session"] == second["session"] == "a"
    assert [first["seconds"], second["seconds"]] == samples
    assert "torch" in first["versions"]
    assert (first["peak_bytes"], second["peak_bytes"]) == (500, 600)
    assert first["config"] == second["config"] == "lra/softpp_listops.py"


def test_a_failed_run_writes_no_times(tmp_path, monkeypatch):
    pretend_mim(monkeypatch)

    def fails(title, *arguments):
        raise CommandError(title)

    monkeypatch.setattr("mmsoft.rows.mim", fails)
    with pytest.raises(CommandError, match="a, 1 of 1"):
        time_in_turns(subjects(), tmp_path / "runs", tmp_path / "a.json", 1, 4, root=ROOT)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("rounds", "iterations"), [(0, 12), (3, 2)])
def test_no_times_at_all_are_refused_before_any_work(tmp_path, rounds, iterations):
    with pytest.raises(ValueError, match="times need at least 1 round of at least 3 iterations"):
        time_in_turns(subjects(), tmp_path, tmp_path / "a", rounds, iterations, root=ROOT)
    assert not any(tmp_path.iterdir())


def test_times_of_others_are_not_lost(tmp_path, monkeypatch):
    runs = pretend_mim(monkeypatch)
    paths = (tmp_path / "runs", tmp_path / "a.json")
    time_in_turns(subjects(), *paths, 1, 4, root=ROOT)
    with pytest.raises(ValueError, match=r"a\.json has times of b, which would be lost"):
        time_in_turns(subjects()[:1], *paths, 1, 4, root=ROOT)
    assert len(runs) == 2
    time_in_turns(subjects(), tmp_path / "again", paths[1], 1, 4, root=ROOT)  # anew, all


def test_a_log_that_lacks_iterations_is_an_error(tmp_path, monkeypatch):
    pretend_mim(monkeypatch)  # of four
    with pytest.raises(CommandError, match="4 iterations in the log of"):
        time_in_turns(subjects(), tmp_path / "runs", tmp_path / "a.json", 1, 5, root=ROOT)
    assert not (tmp_path / "a.json").exists()


def test_one_subject_twice_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="to be timed more than once: b"):
        time_in_turns([*subjects(), subjects()[1]], tmp_path, tmp_path / "a", 1, 4, root=ROOT)
    assert not any(tmp_path.iterdir())


def test_times_in_words():
    assert seconds_of(None) == "-"
    assert seconds_of(dict(seconds=[0.125, 3, 0.5])) == "0.50"
    assert seconds_of(dict(seconds=[8, 12, 9, 10, 11])) == "10 (8.50-12)"
