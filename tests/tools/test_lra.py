"""The table of the Long Range Arena: the page, its rows, the figure, and a run."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from loading import load_tool
from lra_data import write_listops
from pretended_mim import pretend_mim

from mmsoft.builder import build_model
from mmsoft.models.peers import PEERS
from mmsoft.rows import digest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_tool("dev/lra.py")


def test_the_page_and_its_figure_are_current(tool):
    assert tool.stale(*tool.measured()) == []


def test_every_row_is_of_a_config_as_it_is(tool):
    """A row of an older one would stand beside the others as if it were of the same."""
    pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))
    rows = tool.read(tool.ROWS)
    assert rows
    for row in rows:
        config = tool.with_attention(ROOT / "configs" / row["config"], row["attention"])
        label = f"{row['config']}, {row['attention']}"
        assert row["digest"] == digest(config), label
        assert row["scheduled_iterations"] == config.train_cfg.max_iters, label
        try:
            model = build_model(config)
        except ImportError:  # a peer's package is not installed
            continue
        assert row["parameters"] == sum(p.numel() for p in model.parameters()), label


def test_all_times_are_of_a_commit_and_of_configs_as_they_are(tool):
    for each in tool.times_of(tool.TIMES):
        assert "dirty" not in each["commit"], each["name"]
        config = tool.with_attention(ROOT / "configs" / each["config"], each["attention"])
        assert each["digest"] == digest(config), each["name"]


def row(attention="soft++", seed=0, task="listops", iterations=5000, accuracy=37.0, **changes):
    return dict(
        config=f"lra/softpp_{task}.py",
        digest="0123456789ab",
        attention=attention,
        data=None,
        seed=seed,
        commit="0123456789ab",
        iterations=iterations,
        scheduled_iterations=5000,
        metrics={"accuracy/top1": accuracy},
        parameters=200_000,
        peak_bytes=int(9e8),
        threads=1,
        device="a processor",
        versions=dict(torch="2.13.0"),
        validation=[[100, 30.0]],
        **(dict(loss=[[50, 2.3], [100, 2.2]]) | changes),
    )


def lines(page, task):
    text = page.partition(f"\n## {task}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ][2:]


def test_seeds_share_a_line_and_attentions_keep_their_order(tool):
    rows = [row("softmax", accuracy=38.0), row(seed=1, accuracy=36.0), row(accuracy=37.0)]
    rows += [row(iterations=100), row("none", task="pathfinder32", accuracy=50.0)]
    page = tool.render(rows, {})
    assert [line[0] for line in lines(page, "ListOps")] == ["SOFT++", "SOFT++", "softmax"]
    found = lines(page, "ListOps")
    assert ["SOFT++", "200", "0, 1", "5000", "36.50 (36.00-37.00)", "900", "0123456"] in found
    assert ["softmax", "200", "0", "5000", "38.00", "900", "0123456"] in found
    assert lines(page, "Pathfinder")[0][4] == "50.00"
    assert page.index("## ListOps") < page.index("## Pathfinder") < page.index("## What others")
    assert "standard attention" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(digest="ba9876543210"), "rows differ in digest"),
        (dict(data={"seed": 7}), "rows differ in data"),
        (dict(parameters=100_000), "rows differ in parameters"),
        (dict(scheduled_iterations=9000), "rows differ in scheduled_iterations"),
        (dict(seed=0), "two rows of one seed"),
    ],
)
def test_rows_that_differ_by_more_than_their_seeds_share_no_line(tool, change, message):
    rows = [row(), row(seed=1) | change]
    with pytest.raises(ValueError, match=rf"soft\+\+, 5000 iterations: {message}"):
        tool.render(rows, {})


def test_rows_of_several_commits_name_them(tool):
    rows = [row(), row(seed=1) | dict(commit="ba9876543210")]
    assert lines(tool.render(rows, {}), "ListOps")[0][-1] == "0123456, ba98765"


def test_attentions_are_timed_in_turns(tool, tmp_path, monkeypatch):
    runs = pretend_mim(monkeypatch)
    path = ROOT / "configs/lra/softpp_listops.py"
    names = ["softmax", "soft++"]
    tool.time_attentions(path, names, tmp_path / "runs", tmp_path / "out", 2, 4)
    asked = [any(word.endswith("attention=softmax") for word in run) for run in runs]
    assert asked == [True, False, False, True]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["listops.json"]
    times = tool.times_of(tmp_path / "out")
    page = tool.render([], {}, times)
    assert lines(page, "Time") == [
        ["SOFT++", "2.00 (2.00-2.75), 0 MB"],
        ["softmax", "2.00 (1.25-3.50), 0 MB"],
    ]
    assert "d, 1 thread; torch 2; commit 0123456-dirty." in tool.table_of_times([timed(**PLACE)])
    other = dict(times[0], config="lra/softpp_pathfinder32.py", session="pathfinder32")
    assert [line[-1] for line in lines(tool.render([], {}, [*times, other]), "Time")] == [
        "-",
        "2.00 (1.25-3.50), 0 MB",
    ]


def timed(name="listops_softmax", attention="softmax", **changes):
    content = dict(name=name, config="lra/softpp_listops.py", attention=attention)
    says = dict(digest="0123456789ab", data=None, peak_bytes=1, seconds=[1.0])
    return content | says | changes


PLACE = dict(commit="0123456789ab-dirty", device="d", threads=1, versions=dict(torch=2), session="")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([timed(attention="flash")], "attention flash is unknown"),
        ([timed(config="lra/softpp_sudoku.py")], "softpp_sudoku.py is of no known task"),
        ([timed(seconds=[])], "a subject lacks seconds"),
        ([timed(seconds=3)], "is not of lra"),
        ([timed(seconds=["1"])], "seconds of listops_softmax are not positive numbers"),
        ([timed(peak_bytes=None)], "a subject lacks peak_bytes"),
        ([timed(peak_bytes="1")], "a subject lacks peak_bytes"),
        ([{k: v for k, v in timed().items() if k != "data"}], "a subject lacks data"),
        ([], "nothing was timed"),
        ([{"a": 1}], "a subject lacks name, config, seconds"),
        (None, "it lacks timed"),
        (3, "is not of lra"),
        ([3], "is not of lra"),
    ],
)
def test_other_files_of_times_are_refused(tool, tmp_path, content, message):
    session = dict(commit="c", device="d", threads=1, timed=content)
    if content is None:
        del session["timed"]
    (tmp_path / "a.json").write_text(json.dumps(session))
    with pytest.raises(ValueError, match=message) as caught:
        tool.times_of(tmp_path)
    assert "a.json" in str(caught.value)


def test_times_of_two_sessions_are_refused(tool, tmp_path):
    """Ratios of seconds from two days are those of the days."""
    session = dict(commit="c", device="d", threads=1, versions={})
    first, second = timed(), timed("listops_none", "none")
    for name, content in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(session, timed=[content])))
    with pytest.raises(ValueError, match="times of listops are of more than one session"):
        tool.render([], {}, tool.times_of(tmp_path))
    (tmp_path / "b.json").write_text(json.dumps(dict(session, timed=[first])))
    with pytest.raises(ValueError, match=r"listops_softmax was timed in a and in b"):
        tool.times_of(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(dict(session, timed=[second, second])))
    with pytest.raises(ValueError, match=r"listops_none was timed in b and in b"):
        tool.times_of(tmp_path)


def test_baselines_and_rows_near_them(tool, tmp_path):
    """What expressions of the small data say by hand, and a row no better than one class."""
    write_listops(tmp_path / "data")
    # Below MAX there are 0 to 7, below MED 4. Class 7 comes twice more, in the test MED 5 too.
    test = tmp_path / "data/basic_test.tsv"
    test.write_text(test.read_text() + "( ( [MAX 7 ) ] )\t7\n" * 2 + "( ( [MED 5 ) ] )\t5\n")
    train = tmp_path / "data/basic_train.tsv"
    train.write_text(train.read_text() + "( ( [MAX 7 ) ] )\t7\n" * 2)
    (tmp_path / "data/parameters.json").write_text('{"seed": 3}')
    path = tool.baselines("listops-1000", tmp_path / "data", tmp_path / "rows")
    assert path == tmp_path / "rows/listops-1000.json"
    found = tool.read_baselines(tmp_path / "rows")
    one = found["listops-1000"]
    assert one["data"] == {"seed": 3}
    assert one["test_size"] == 12
    assert one["most_frequent"] == dict(answer=7, accuracy=25)
    assert one["root_operator"] == dict(answers=dict(MAX=7, MED=4), accuracy=pytest.approx(100 / 3))
    rows = [
        row(task="listops-1000", accuracy=27.0),
        row("none", task="listops-1000", accuracy=27.1),
    ]
    page = tool.render(rows, found)
    assert [line[:1] + line[4:5] for line in lines(page, "ListOps, 500 to 1000 tokens")] == [
        ["SOFT++", "27.00, not past one class for all"],
        ["none", "27.10"],
        ["one class for all", "25.00"],
        ["the root operator alone", "33.33"],
    ]
    # sqrt(1/3 * 2/3 / 12) is 13.6 %
    assert "by the root operator MAX 7, MED 4. The standard error" in page
    assert "test's 12 expressions is 13.6 points" in page
    assert "test's 12" in tool.render([], found)


def test_published_means(tool):
    """As quoted: 58.77 and 58.95 (Nystromformer's), 59.39 (Skyformer)."""
    means = [line[-1] for line in lines(tool.render([], {}), "What others publish")]
    assert means == ["58.77", "58.95", "57.37", "58.56", "58.93", "59.39"]


def test_the_figure(tool, tmp_path, monkeypatch):
    rows = [row(), row(seed=1), row("softmax"), row("none", task="pathfinder32")]
    tool.draw(rows, tmp_path / "learning.png")
    assert cv2.imread(str(tmp_path / "learning.png")).std() > 10
    for name, content in (("FIGURE", None), ("PAGE", tool.render(rows, {}))):
        path = tmp_path / ("learning.png" if content is None else "page.md")
        monkeypatch.setattr(tool, name, path)
        if content:
            path.write_text(content)
    assert tool.stale(rows, {}) == []
    other = [*rows[:3], row("none", task="pathfinder32", loss=[[50, 2.4]])]
    assert tool.stale(other, {}) == [tmp_path / "learning.png"]  # what the page does not show
    assert tool.stale(rows[:3], {}) == [tmp_path / "page.md", tmp_path / "learning.png"]
    with pytest.raises(ValueError, match="no runs"):
        tool.draw([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention="flash"), "attention flash is unknown"),
        (dict(config="lra/softpp_sudoku.py"), "config softpp_sudoku.py is of no known task"),
        (dict(loss=None), "it lacks loss"),
        (dict(digest=None), "it lacks digest"),
    ],
)
def test_other_files_are_refused(tool, tmp_path, change, message):
    lacking = [key for key, value in change.items() if value is None]
    content = {k: v for k, v in {**row(), **change}.items() if k not in lacking}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json is not of lra\.py: {message}"):
        tool.read(tmp_path)


def test_every_attention_changes_the_config(tool):
    """The changes name options that the backbone has."""
    pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))
    seen = []
    for name in tool.ATTENTIONS:
        config = tool.with_attention(ROOT / "configs/lra/softpp_listops-1000.py", name)
        try:
            seen.append(repr(build_model(config, "backbone")))
        except ImportError:  # its package is not installed
            assert any(name.startswith(peer) for peer in PEERS)
    assert len(set(seen)) == len(seen)


def test_a_schedule_shorter_than_its_warm_up_is_refused_before_any_work(tool, tmp_path):
    path = ROOT / "configs/lra/softpp_listops.py"
    with pytest.raises(ValueError, match="iterations must be more than the warm-up's 1000, got 9"):
        tool.run(path, "soft++", 0, tmp_path / "work", 9, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_row_says_which_data_it_used(tool, tmp_path, monkeypatch):
    """Parameters of generated ones; nothing of those as distributed."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(tool, "measure_row", lambda *_, extra, **__: found.append(extra([])))
    for content in (None, {"seed": 7}):
        if content:
            write_listops(tmp_path / "data/listops")
            (tmp_path / "data/listops/parameters.json").write_text(json.dumps(content))
        tool.run(ROOT / "configs/lra/softpp_listops.py", "softmax", 0, Path("w"), None, Path("o"))
    assert [row["data"] for row in found] == [None, {"seed": 7}]


@pytest.mark.long
@pytest.mark.parametrize("attention", ["soft++", "content", "none"])
def test_a_run_writes_its_row(tool, tmp_path, attention):
    write_listops(tmp_path / "data/listops")
    (tmp_path / "data/listops/parameters.json").write_text('{"seed": 7}')
    command = [sys.executable, ROOT / "tools/dev/lra.py", "run"]
    command += [ROOT / "configs/lra/softpp_listops.py", "--attention", attention, "--iters", "1002"]
    command += ["--work-dir", "work", "--out", "rows", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tool.read(tmp_path / "rows")
    assert (tmp_path / f"rows/listops_{attention}_1002-iterations_seed3.json").exists()
    assert (found["attention"], found["seed"], found["iterations"]) == (attention, 3, 1002)
    assert {50, 1000} <= {step for step, _ in found["loss"]}
    assert found["validation"][0][0] == 1000
    assert found["data"] == {"seed": 7}
    assert 0 <= found["metrics"]["accuracy/top1"] <= 100
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "work exists; name a new folder" in again.stderr
