"""The model zoo: its tables are current, and its parameters are the published ones."""

import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from loading import load_tool
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmsoft.models import SOFTPlusPlus

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain.models", exc_type=(ImportError, RuntimeError))

IMAGENET = dict(tiny=13.07, small=24.11, medium=45.81, large=64.70, huge=87.11)
PUBLISHED = dict(  # million
    soft=IMAGENET,
    softpp=IMAGENET,
    retinanet=dict(t=23, s=34, m=55, l=74),
    mask=dict(t=33, s=44, m=65, l=84),
    upernet=dict(s=54, m=76),
)
CHEAP = {
    "soft": "soft-tiny_8xb128_in1k",
    "retinanet": "retinanet_softpp-t_fpn_1x_coco",
    "mask_rcnn": "mask-rcnn_softpp-t_fpn_1x_coco",
    "upernet": "upernet_softpp-t_8xb2-160k_ade20k-512x512",
}


@pytest.fixture(scope="module")
def zoo(root):
    return load_tool("dev/model_zoo.py")


@pytest.fixture(scope="module")
def counts(zoo):
    """Parameters as counted now, FLOPs as the metafiles have them."""
    return zoo.count_all(zoo.read_counts())


def test_tables_and_metafiles_are_current(zoo, counts):
    assert zoo.stale(zoo.render(counts)) == [], "run python tools/dev/model_zoo.py"


@pytest.mark.parametrize(
    "folder", sorted(CHEAP.keys() - {"retinanet"})
)  # of which Mask R-CNN has most
def test_flops_are_current(zoo, folder):
    config = Config.fromfile(zoo.ROOT / "configs" / folder / f"{CHEAP[folder]}.py")
    found = zoo.read_counts()[CHEAP[folder]]
    assert zoo.count_flops(config, zoo.SHAPES[folder]) == (found.flops, found.inverse)


@pytest.mark.long
def test_all_flops_are_current(zoo):
    assert zoo.count_all() == zoo.read_counts()


def test_parameters_are_the_published_ones(counts):
    checked = 0
    for name, count in counts.items():
        family, size = re.split("[-_]", name)[0], re.search("soft(?:pp)?-([a-z]+)_", name)[1]
        if size in PUBLISHED.get(family, {}):
            parameters, digits = count.parameters / 1e6, 0.006 if "soft" in family else 0.6
            assert parameters == pytest.approx(PUBLISHED[family][size], abs=digits), name
            checked += 1
    assert checked == 10 + 4 + 7 + 2


@pytest.mark.parametrize(("budget", "solver"), [(None, "newton"), (4, "direct")])
def test_computed_cost_of_the_operator_equals_the_traced_one(zoo, budget, solver):
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # of operators that are not counted
    options = dict(landmarks="released", max_landmarks=budget, solver=solver)
    backbone = SOFTPlusPlus("tiny", **options).eval()
    traced = FlopAnalyzer(backbone, torch.rand(1, 3, 120, 200)).by_operator()
    landmarks, macs = zoo.operator_macs((120, 200), budget, solver, "tiny")
    assert landmarks == (budget or 3 * 6)
    assert macs["kernel products"] == traced["gaussian_kernel_product"]
    assert macs["pseudo-inverse"] == sum(traced[name] for name in zoo.INVERSE) > 0


# ---------------------------------------------------------- the tool, on a copy of the files


@pytest.fixture
def copy(zoo, root, tmp_path, monkeypatch):
    shutil.copytree(root / "configs", tmp_path / "configs")
    shutil.copytree(root / "docs", tmp_path / "docs")
    shutil.copy(root / "model-index.yml", tmp_path)
    monkeypatch.setattr(zoo, "ROOT", tmp_path)
    return tmp_path


def run(zoo, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["model_zoo.py", *arguments])
    zoo.main()


def test_stale_files_are_named_and_rewritten(zoo, counts, copy, monkeypatch, capsys):
    name = CHEAP["retinanet"]
    count = counts[name]
    changed = counts | {name: replace(count, parameters=count.parameters + 10**7)}
    monkeypatch.setattr(zoo, "count_all", lambda known: changed)
    before = (copy / "docs/model_zoo.md").read_text()
    with pytest.raises(SystemExit) as caught:
        run(zoo, monkeypatch, "--check")
    files = ["configs/retinanet/metafile.yml", "configs/retinanet/README.md", "docs/model_zoo.md"]
    assert caught.value.code.startswith(f"stale: {', '.join(files)};")
    assert before == (copy / "docs/model_zoo.md").read_text()  # --check writes nothing

    run(zoo, monkeypatch)
    assert capsys.readouterr().out.splitlines() == [f"wrote {file}" for file in files]
    lines = set(before.splitlines()) ^ set((copy / "docs/model_zoo.md").read_text().splitlines())
    assert len(lines) == 2  # the old and the new row
    assert all(name in line for line in lines)
    assert zoo.read_counts()[name].parameters == count.parameters + 10**7
    run(zoo, monkeypatch, "--check")
    left = sorted(p.name for p in copy.iterdir())
    assert left == ["configs", "docs", "model-index.yml"]


def test_a_config_without_an_entry_is_named(zoo, copy):
    shutil.copy(
        copy / f"configs/retinanet/{CHEAP['retinanet']}.py", copy / "configs/retinanet/x.py"
    )
    with pytest.raises(ValueError, match=r"configs/retinanet and its metafile.yml differ in x$"):
        zoo.count_all(zoo.read_counts())


def test_missing_markers_are_named(zoo, copy, monkeypatch):
    (copy / "docs/model_zoo.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"error: .*model_zoo.md must have .* <!-- model zoo"):
        run(zoo, monkeypatch)


def test_published_figures_are_marked_as_the_authors(zoo):
    found = 0
    for _, model in zoo.models():
        metrics = [name for r in model.get("Results", []) for name in r["Metrics"]]
        assert all(name.endswith(zoo.PUBLISHED) for name in metrics)
        assert len(zoo.published(model)) == len(metrics)
        found += len(metrics)
    assert found == 10 + 4 + 2 * 4 + 2
