"""The table of the Long Range Arena: the page, its rows, the figure, and a run."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from loading import load_tool
from lra_data import write_listops
from mmengine.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_tool("dev/lra.py")


def test_the_page_is_current(tool):
    assert tool.PAGE.read_text() == tool.render(tool.read(tool.ROWS)), "run lra.py table"
    assert tool.FIGURE.exists() == bool(tool.read(tool.ROWS))


def test_every_row_is_of_a_config_as_it_is(tool):
    for row in tool.read(tool.ROWS):
        config = Config.fromfile(ROOT / "configs" / row["config"], import_custom_modules=False)
        assert row["scheduled_iterations"] == config.train_cfg.max_iters, row["config"]


def row(attention="soft++", seed=0, task="listops", iterations=5000, accuracy=37.0, **changes):
    return dict(
        config=f"lra/softpp_{task}.py",
        attention=attention,
        seed=seed,
        commit="0123456789ab",
        iterations=iterations,
        scheduled_iterations=5000,
        metrics={"accuracy/top1": accuracy},
        parameters=200_000,
        seconds_per_iteration=None,
        training_seconds=None,
        testing_seconds=None,
        peak_bytes=int(9e8),
        threads=1,
        device="a processor",
        versions=dict(torch="2.13.0"),
        loss=[[50, 2.3], [100, 2.2]],
        validation=[[100, 30.0]],
        **changes,
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
    page = tool.render(rows)
    assert [line[0] for line in lines(page, "ListOps")] == ["SOFT++", "SOFT++", "softmax"]
    found = lines(page, "ListOps")
    assert ["SOFT++", "200", "0, 1", "5000", "36.50 (36.00-37.00)", "-", "900"] in found
    assert ["softmax", "200", "0", "5000", "38.00", "-", "900"] in found
    assert lines(page, "Pathfinder")[0][4] == "50.00"
    assert page.index("## ListOps") < page.index("## Pathfinder") < page.index("## What others")
    assert "standard attention" in page


def test_published_means(tool):
    """As quoted: 58.77 and 58.95 (Nystromformer's), 59.39 (Skyformer)."""
    means = [line[-1] for line in lines(tool.render([]), "What others publish")]
    assert means == ["58.77", "58.95", "57.37", "58.56", "58.93", "59.39"]


def test_the_figure(tool, tmp_path):
    rows = [row(), row(seed=1), row("softmax"), row("none", task="pathfinder32")]
    tool.draw(rows, tmp_path / "learning.png")
    assert cv2.imread(str(tmp_path / "learning.png")).std() > 10
    with pytest.raises(ValueError, match="no runs"):
        tool.draw([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention="flash"), "attention flash is unknown"),
        (dict(config="lra/softpp_sudoku.py"), "config softpp_sudoku.py is of no known task"),
        (dict(loss=None), "it lacks loss"),
    ],
)
def test_other_files_are_refused(tool, tmp_path, change, message):
    content = {k: v for k, v in {**row(), **change}.items() if v is not None or k != "loss"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json is not a row of lra\.py: {message}"):
        tool.read(tmp_path)


def test_every_attention_changes_the_config(tool):
    """The changes name options that the backbone has."""
    from mmsoft.builder import build_model

    pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))
    seen = set()
    for name, (_, changes) in tool.ATTENTIONS.items():
        config = Config.fromfile(ROOT / "configs/lra/softpp_listops-1000.py")
        config.merge_from_dict(tool.options(changes))
        try:
            seen.add(repr(build_model(config, "backbone")))
        except ImportError as error:
            pytest.skip(str(error))
        assert name in tool.ATTENTIONS
    assert len(seen) == len(tool.ATTENTIONS)


def test_a_schedule_shorter_than_its_warm_up_is_refused_before_any_work(tool, tmp_path):
    path = ROOT / "configs/lra/softpp_listops.py"
    with pytest.raises(ValueError, match="iterations must be more than the warm-up's 1000, got 9"):
        tool.run(path, "soft++", 0, tmp_path / "work", 9, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("attention", ["soft++", "content", "none"])
def test_a_run_writes_its_row(tool, tmp_path, attention):
    write_listops(tmp_path / "data/listops")
    command = [sys.executable, ROOT / "tools/dev/lra.py", "run"]
    command += [ROOT / "configs/lra/softpp_listops.py", "--attention", attention, "--iters", "1002"]
    command += ["--work-dir", "work", "--out", "rows", "--untimed", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tool.read(tmp_path / "rows")
    assert (tmp_path / f"rows/listops_{attention}_1002-iterations_seed3.json").exists()
    assert (found["attention"], found["seed"], found["iterations"]) == (attention, 3, 1002)
    assert {50, 1000} <= {step for step, _ in found["loss"]}
    assert found["validation"][0][0] == 1000
    assert found["seconds_per_iteration"] is None
    assert 0 <= found["metrics"]["accuracy/top1"] <= 100
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "work exists; name a new folder" in again.stderr
