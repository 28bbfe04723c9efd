"""The benchmark: its command, its arithmetic, and its released algorithm. No timings."""

import json
import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from metrics import error
from operators import Calls
from released import ARCH, images, outputs, state_dict

from mmsoft.benchmark import cases, compare, measure, page, plots, report
from mmsoft.benchmark.__main__ import USUAL, main, parser, plan
from mmsoft.benchmark.released import ReleasedAttention, ReleasedSOFTPlusPlus
from mmsoft.checkpoint import convert_released_keys
from mmsoft.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from mmsoft.ops import launch, reference
from mmsoft.ops.backends import OPERATIONS

pytest.importorskip("matplotlib")
pytest.importorskip("mmdet")


@pytest.fixture
def command(root, run_outside):
    """Run the program in an empty folder."""
    return partial(run_outside, "-m", "mmsoft.benchmark", PYTHONPATH=str(root))


# --------------------------------------------------------------------------- the released algorithm


def test_released_attention_equals_the_reference():
    """On one sample, whose own maximum is the batch's, it equals the reference."""
    layer = ReleasedAttention(64, 2, 4, 5, normalize=True, attn_init="released").double()
    layer.landmark_norm.weight.data.fill_(0.5)
    q, v = torch.randn(2, 1, 16 * 24, 64).double().unbind()
    ours, *_ = layer.sample_landmarks(q, (16, 24))
    split = [t.unflatten(2, (2, 32)).transpose(1, 2) for t in (q, v)]
    expected = reference.softmax_free_attention(*split, ours).transpose(1, 2).flatten(2)
    found = layer.float().attend(q.float(), v.float(), (16, 24))
    assert error(found, expected) < 1e-4


@pytest.mark.parametrize("condition", ["wellcond", "illcond"])
@pytest.mark.parametrize("size", [(224, 224), (160, 256)], ids=str)
def test_released_model_gives_the_golden_outputs(condition, size):
    weights = convert_released_keys(state_dict(condition == "illcond"))
    weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
    model = ReleasedSOFTPlusPlus(ARCH).eval()
    model.load_state_dict(weights)
    expected = outputs("softpp", condition, size)
    with torch.no_grad():
        for i, image in enumerate(images(*size).split(1)):
            for stage, out in enumerate(model(image), 1):
                truth = expected[f"stage{stage}"][i : i + 1]
                assert error(out[:, ::5, ::3, ::3], truth) < 1e-4


def test_released_tiny_has_the_weights_of_ours_and_its_own_attention():
    ours, released = (
        cases.make_model(cases.Case("backbone", name, (64, 64)))
        for name in ("softpp-tiny", "released-tiny")
    )
    names = dict(ours.named_parameters()), dict(released.named_parameters())
    assert names[0].keys() == names[1].keys()
    for name, parameter in names[0].items():
        # Landmarks by content need wider queries.
        assert name.endswith("query.weight") or torch.equal(parameter, names[1][name])
    for model, kind in ((ours, SoftmaxFreeAttention), (released, ReleasedAttention)):
        layers = [m for m in model.modules() if isinstance(m, SoftmaxFreeAttention)]
        assert [type(layer) for layer in layers] == [kind] * 6


# --------------------------------------------------------------------------------- what is measured


def test_our_backbones_have_the_defaults():
    for name in [name for name in USUAL if name.startswith("softpp")]:
        model = cases.make_backbone(name)
        layers = [m for m in model.modules() if isinstance(m, SoftmaxFreeAttention)]
        by_content = not name.endswith("newton")
        assert {(layer.by_content, layer.max_landmarks) for layer in layers} == {(by_content, 49)}


@pytest.mark.parametrize("name", cases.LANDMARKS)
def test_settings_between_the_release_and_ours_are_what_their_names_say(name):
    layers = [m for m in cases.make_backbone(name).modules() if isinstance(m, SoftmaxFreeAttention)]
    _, _, kind, budget = name.split("-")
    for layer in layers:
        assert layer.max_landmarks == (None if budget == "all" else int(budget))
        assert layer.by_content == (kind == "content")
        assert kind in ("content", layer.solver)


def test_without_max_keys_stage_4_keeps_all():
    for end, bound in (("", 2048), (cases.UNBOUNDED, None)):
        model = cases.make_backbone(f"softpp-tiny{end}")
        found = {m.max_keys for m in model.modules() if isinstance(m, SoftmaxAttention)}
        assert found == {bound}


PEERS = {  # channels of the features and published parameters (M), with their classifier or not
    "pvt-tiny": ([64, 128, 320, 512], 12.7),
    "pvtv2-b1": ([64, 128, 320, 512], 13.5),
    "pvtv2-b2": ([64, 128, 320, 512], 24.8),
    "pvtv2-b3": ([64, 128, 320, 512], 45.2),
    "pvtv2-b4": ([64, 128, 320, 512], 62.6),
    "swin-tiny": ([96, 192, 384, 768], 27.5),
    "swin-small": ([96, 192, 384, 768], 50),
    "convnext-tiny": ([96, 192, 384, 768], 27.8),
    "convnext-small": ([96, 192, 384, 768], 50),
    "resnet-50": ([256, 512, 1024, 2048], 23.5),
    "resnet-101": ([256, 512, 1024, 2048], 42.5),
    "van-b1": ([64, 128, 320, 512], 13.9),
    "davit-tiny": ([96, 192, 384, 768], 28.3),
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_those_of_the_libraries(name):
    if cases.BACKBONES[name].config.startswith("mmpretrain"):
        pytest.importorskip("mmpretrain")
    model = cases.make_model(cases.Case("backbone", name, (64, 64)))
    model.eval()  # returns None in some of the libraries' backbones
    channels, parameters = PEERS[name]
    with torch.no_grad():
        shapes = [tuple(out.shape[1:]) for out in model(torch.randn(1, 3, 64, 64))]
    assert shapes == [(c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16, 32))]
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert counted == pytest.approx(parameters, rel=0.05)
    # The peer is ours of its size in parameters, the nearest of the four.
    ours = {
        arch: cases.BACKBONES[f"softpp-{arch}"] for arch in ("tiny", "small", "medium", "large")
    }
    sizes = dict(zip(ours, (12.6, 23.6, 45.3, 64.2)))
    nearest = min(sizes, key=lambda arch: abs(sizes[arch] - counted))
    assert cases.BACKBONES[name].ours == f"softpp-{nearest}"
    assert cases.BACKBONES[name + cases.CHANNELS_LAST].channels_last


def planned(*arguments):
    return plan(parser().parse_args(arguments))


def test_the_preset_of_a_cpu_measures_every_peer_and_what_is_large_where_it_matters():
    groups = [found for section, found in planned("--preset", "cpu") if section == "results"]
    by_kind = {
        (case.size, case.mode, case.dtype): [
            c.name for c in group if (c.mode, c.dtype) == (case.mode, case.dtype)
        ]
        for group in groups
        for case in group
    }
    assert len(groups) == 4  # bfloat16 takes turns with float32
    both = {name + end for name in PEERS for end in ("", cases.CHANNELS_LAST)}
    for size in ((224, 224), (512, 512), (800, 1344)):
        assert both < set(by_kind[size, "forward", "float32"])
    assert set(cases.LANDMARKS) < set(by_kind[(800, 1344), "forward", "float32"])
    assert not set(cases.LANDMARKS) & set(by_kind[(512, 512), "forward", "float32"])
    half = set(by_kind[(800, 1344), "forward", "bfloat16"])
    assert half == {"softpp-tiny", "softpp-small"} | {
        name + end
        for name in ("swin-tiny", "convnext-tiny", "resnet-50")
        for end in ("", cases.CHANNELS_LAST)
    }
    trained = set(by_kind[(512, 512), "train", "float32"])
    peers = {"pvt-tiny", "pvtv2-b1", "pvtv2-b2", "swin-tiny", "convnext-tiny", "resnet-50"}
    peers |= {name + cases.CHANNELS_LAST for name in peers}
    assert trained == {"softpp-tiny", "softpp-small"} | peers
    assert all(case.device == "cpu" for group in groups for case in group)


def test_the_presets_sections():
    found = {}
    for section, group in planned("--preset", "cpu"):
        found.setdefault(section, []).append([(case.name, case.size) for case in group])
    names = [name for name, _ in found["scaling"][0]]
    assert names == ["softpp-tiny", "softpp-small", "softpp-tiny-max-keys-none"]
    whole = [(cases.WHOLE[group[0][0]].task, group[0][1]) for group in found["whole"]]
    assert whole == [
        ("RetinaNet", (800, 1344)),
        ("Mask R-CNN", (800, 1344)),
        ("UperNet", (512, 512)),
        ("UperNet", (512, 2048)),
    ]
    assert {section: len(groups) for section, groups in found.items()} == dict(
        results=4, scaling=3, whole=4
    )
    rest = planned("--operator", "--sequence", "--onnx")
    for groups, number in ((planned("--preset", "cuda", "--onnx"), 5), (rest, 3)):
        assert len({section for section, _ in groups}) == number


def test_arguments_replace_what_a_preset_has():
    groups = planned("--preset", "cpu", "--models", "softpp-tiny", "--dtypes", "bfloat16")
    found = [case for section, group in groups if section == "results" for case in group]
    assert [(c.name, c.dtype, c.size[0], c.mode) for c in found] == [
        ("softpp-tiny", "bfloat16", size, mode)
        for size, mode in ((224, "forward"), (512, "forward"), (800, "forward"), (512, "train"))
    ]
    groups = planned("--sizes", "64", "96", "--modes", "train", "--compile")
    assert [(g[0].size[0], g[0].compiled) for _, g in groups] == [
        (size, compiled) for compiled in (False, True) for size in (64, 96)
    ]
    assert "released-tiny" not in [case.name for case in groups[0][1]]
    groups = planned("--sizes", "64", "96", "--batch", "3", "2", "--compile", "only")
    assert [(g[0].size[0], g[0].batch, g[0].compiled) for _, g in groups] == [
        (64, 3, True),
        (96, 2, True),
    ]
    groups = planned("--preset", "cuda")
    kinds = {(c.size, c.batch, c.mode, c.dtype) for s, g in groups if s == "results" for c in g}
    assert len(kinds) == 3 * 2 * 3
    whole = [group[0].dtype for section, group in groups if section == "whole"]
    assert whole == ["float32", "tf32", "bfloat16"] * 4


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in cases.WHOLE if not name.startswith("uper")])
def test_detectors_find_as_much_as_trained_ones_may(name):
    case = cases.Case("whole", name, (96, 96))
    (found,) = cases.make_step(cases.make_model(case), case)()
    assert 10 < len(found.pred_instances) <= 100
    assert ("masks" in found.pred_instances) == name.startswith("mask")


# -------------------------------------------------------------------------------------- the command


@pytest.mark.long
def test_a_run_writes_json_plots_and_docs(command, tmp_path):
    pytest.importorskip("mmseg")
    backbones = "--models softpp-tiny pvtv2-b1 --sizes 64 --modes forward train"
    others = "--scaling 96 --operator 8 --sequence 96 --whole 64 --repeats 1 --threads 1 --out out"
    done = command(*backbones.split(), *others.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "round 1 of 1" in done.stdout
    data = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [(e["backbone"], e["mode"]) for e in data["results"]] == [
        (name, mode) for mode in ("forward", "train") for name in ("softpp-tiny", "pvtv2-b1")
    ]
    assert [e["size"] for e in data["scaling"]] == [[96, 96]] * 3
    tasks = ("RetinaNet", "Mask R-CNN", "UperNet")
    assert [e["task"] for e in data["whole"]] == [task for task in tasks for _ in range(6)]
    names = {e["name"] for e in data["operator"]}
    assert {"softpp", "softmax"} <= names
    for skipped in data["skipped"]:  # only packages that are not installed
        assert skipped["section"] in ("operator", "sequence")
        assert "pip install 'mmsoft[peers]'" in skipped["reason"]
    assert {"softpp", "softmax", "gaussian", "none"} <= {e["name"] for e in data["sequence"]}
    assert data["onnx"] == []
    for entry in [e for key in report.SECTIONS for e in data[key]]:
        assert 0 < entry["q10_ms"] <= entry["median_ms"] <= entry["q90_ms"]
        assert entry["peak_mib"] is not None
    for entry in data["results"]:
        assert entry["params_m"] > 10
        assert entry["gmacs"] > 0.1
        assert entry["images_per_second"] == pytest.approx(1000 / entry["median_ms"])
    plots = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {path.stem for path in (tmp_path / "out").glob("*.svg")} == {Path(n).stem for n in plots}
    names = {"backbones_cpu_float32.png", "scaling.png", "whole.png", "operator.png"}
    names |= {"memory.png", "tradeoff.png", "sequence.png", "sequence_memory.png"}
    assert plots == names

    done = command("--write-docs", "out/benchmark.json", "--out", "docs")
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "docs/benchmarks.md").read_text()
    for words in (data["device"], data["date"][:10], f"torch {torch.__version__}", data["command"]):
        assert words in text
    for name in names:
        assert f"](benchmarks/{name})" in text
        assert f"[SVG](benchmarks/{Path(name).stem}.svg)" in text
        assert (tmp_path / "docs/benchmarks" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "swin-huge"), ("swin-huge", "softpp-tiny", "pvtv2-b1")),
        (("--sizes", "big"), ("'big'", "224", "800x1344")),
        (("--sizes", "8"), ("'8'", "at least 32")),
        (("--repeats", "0"), ("--repeats", "positive")),
        (("--sizes", "64", "96", "--batch", "1", "2", "3"), ("--batch", "each of the 2")),
        (("--preset", "cpu", "--sizes", "64"), ("--preset", "--sizes", "leave")),
        (("--models", "released-tiny", "--modes", "train"), ("released-tiny", "forward")),
        (("--write-docs", "none.json"), ("none.json",)),
        (("plot", "none.json"), ("none.json",)),
    ],
    ids=lambda value: "-".join(value)[:24],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    assert not (tmp_path / "work_dirs").exists()


# ------------------------------------------------------------------------------- ratios and targets


def measured(backbone, median, peak, size=(800, 1344), batch=1, mode="forward", **more):
    kind = dict(device="cpu", dtype="float32", compiled=False)
    times = dict(median_ms=median, q10_ms=median, q90_ms=median, min_ms=median, peak_mib=peak)
    rate = dict(images_per_second=1000 * batch / median)
    where = dict(backbone=backbone, size=list(size), batch=batch, mode=mode)
    return {**where, **kind, **times, **rate, "params_m": 10.0, "repeats": 11, **more}


@pytest.fixture
def data():
    results = [
        measured("softpp-tiny", 100.0, 50.0, gmacs=50.0),
        measured("softpp-small", 200.0, 80.0),
        measured("softpp-tiny-newton", 150.0, 60.0),
        measured("released-tiny", 2900.0, 400.0),
        measured("pvtv2-b1", 250.0, 75.0),
        measured("pvt-tiny", 219.0, 75.0),
        measured("swin-tiny", 300.0, 40.0),
        measured("softpp-tiny", 70.0, 90.0, (512, 512), 2, "train"),
        measured("pvtv2-b1", 63.0, 100.0, (512, 512), 2, "train"),
        measured("pvtv2-b1", 1.0, 1.0, dtype="bfloat16"),  # no target is about this one
        measured("softpp-tiny", 50.0, 50.0, dtype="bfloat16"),
        measured("softpp-small", 100.0, 80.0, dtype="bfloat16"),
        measured("swin-tiny", 150.0, 80.0, dtype="bfloat16"),
        measured("swin-tiny-channels-last", 139.0, 80.0, dtype="bfloat16"),
    ]
    scaling = [
        measured("softpp-tiny", 10.0, 10.0, (1024, 1024)),
        measured("softpp-tiny", 48.0, 40.0, (2048, 2048)),
        measured("softpp-tiny", 240.0, 100.0, (4096, 4096)),
    ]
    whole = [
        measured("softpp-tiny", 500.0, 1.0, task="RetinaNet"),
        measured("pvtv2-b1", 600.0, 1.0, task="RetinaNet"),
        measured("softpp-small", 500.0, 1.0, task="RetinaNet"),
        measured("swin-tiny", 400.0, 1.0, task="RetinaNet"),
    ]
    about = dict(device="a processor", threads=2, versions={"torch": "2"}, date="2026-01-01T00:00")
    sections = dict(results=results, scaling=scaling, whole=whole)
    about["ceilings"] = dict(float32_tflops=1.5)
    return dict(about, command="x", skipped=[], **sections, operator=[], sequence=[], onnx=[])


def test_ratios_are_against_ours_of_the_same_size_and_kind(data):
    results = data["results"]
    found = [report.ratio(entry, results, "min_ms") for entry in results]
    expected = [1, 1, 1.5, 29, 2.5, 2.19, 1.5, 1, 0.9, 0.02, 1, 1, 1.5, 1.39]
    assert found == pytest.approx(expected)
    assert report.ratio(results[-1], results[:10], "min_ms") is None
    assert report.ratio(results[6], results, "peak_mib") == pytest.approx(0.5)
    rows = report.table(results[:7])
    assert rows[0][-2:] == ["time / ours", "memory / ours"]
    assert rows[4][-2:] == ["29.0", "8.00"]


def test_a_dtype_without_products_takes_no_minutes(monkeypatch):
    """bfloat16 on a CPU without it: two seconds for a side of 512."""
    sides = []

    def seconds_of(step, calls, device):
        if isinstance(step, partial):
            side, dtype = step.args[0].shape[0], step.args[0].dtype
            sides.append((side, dtype))
            return 2 * side**3 / (1e9 if dtype == torch.bfloat16 else 1e11)
        return 0.1

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    found = measure.ceilings("cpu", ["float32", "bfloat16"])
    assert found["float32_tflops"] == pytest.approx(0.1)
    assert found["bfloat16_tflops"] == pytest.approx(0.001)
    assert set(sides) == {(256, torch.float32), (2048, torch.float32), (256, torch.bfloat16)}


def test_shares_of_the_ceilings():
    ceilings = dict(float32_tflops=2.0, copy_gb_s=4.0)
    entry = measured("softpp-tiny", 500.0, 1.0, batch=2, gmacs=100.0, traffic_gib=1.0)
    assert report.rates(entry, ceilings) == pytest.approx((0.4, 2**30 / 2e9))
    assert report.rates(entry, {}) == (None, None)
    assert report.rates(entry | dict(mode="train"), ceilings)[0] is None
    head, row = report.table([entry], ceilings)
    assert dict(zip(head, row))["of product"] == "40 %"
    assert "of product" not in report.table([entry])[0]


def test_targets_take_the_faster_memory_format_of_a_peer(data):
    claim = "800x1344: SOFT++ Small's speed over {}'s"
    for times in ((260.0, 300.0), (300.0, 260.0)):
        names = ("convnext-tiny", "convnext-tiny-channels-last")
        run = dict(data, results=[*data["results"], *map(measured, names, times, (1.0, 1.0))])
        found = {target.claim: target.measured for target in page.targets(run)}
        assert found[claim.format("ConvNeXt-T")] == 1.3
        summary = {row[0]: row[2:] for row in report.against_peers(run["results"])}
        assert summary["ConvNeXt-T"][0] == "1.30"


def test_ratios_are_of_minima_with_those_of_medians_beside_them(data):
    data["results"][0]["min_ms"] = 80.0
    (tiny,) = [t for t in page.targets(data) if t.claim.endswith("Tiny's speed over PVTv2-B1's")][
        :1
    ]
    assert (tiny.measured, tiny.medians) == (250 / 80, 2.5)
    row = next(row for row in page.target_rows(data) if row[0] == tiny.claim)
    assert row[1:] == ["3.12", "2.50", "≥ 3", "yes"]
    head, *rows = report.table(data["results"][:7])
    assert dict(zip(head, rows[4]))["time / ours"] == "3.12"


def test_each_peer_is_compared_with_ours_of_its_size(data):
    head, *rows = report.against_peers(data["results"])
    assert head[2:] == ["800x1344, float32", "512x512, train, float32", "800x1344, bfloat16"]
    assert rows == [
        ["PVT-Tiny", "SOFT++ Tiny", "2.19", "-", "-"],
        ["PVTv2-B1", "SOFT++ Tiny", "2.50", "0.900", "0.0200"],
        ["Swin-T", "SOFT++ Small", "1.50", "-", "1.39"],
    ]


def test_the_model_zoo_has_peers_in_their_faster_format(data):
    faster = measured("swin-tiny-channels-last", 250.0, 41.0)
    table = report.overview(dict(data, results=[*data["results"][:7], faster]))
    (row,) = [line for line in table.splitlines() if "Swin-T" in line]
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["4.00", "41.0"]


@pytest.mark.parametrize(
    ("section", "side", "seconds", "calls", "runs"),
    [
        ("backbone", 8, 0.5, 2 + 5, 5),
        ("backbone", 8, 1.5, 1 + 5, 5),
        ("backbone", 1024, 5, 1 + 2, 2),
        ("backbone", (800, 1344), 1.5, 1 + 2, 2),
        ("whole", 8, 1.5, 1 + 5, 5),
        ("backbone", 8, 30, 2, 2),
    ],
)
def test_slow_calls_and_large_images_run_less_often(
    monkeypatch, section, side, seconds, calls, runs
):
    made = []
    monkeypatch.setattr(measure, "make_model", lambda case: None)
    monkeypatch.setattr(measure, "make_step", lambda model, case: None)
    monkeypatch.setattr(measure, "seconds_of", lambda *_: made.append(seconds) or seconds)
    size = side if isinstance(side, tuple) else (side, side)
    case = cases.Case(section, "softpp-tiny", size)
    times, skipped = measure.measure_times([case], {}, 5, 2, print)
    assert not skipped
    assert times[case]["repeats"] == runs
    assert len(made) == calls


def test_a_case_that_cannot_be_compiled_does_not_stop_the_others(monkeypatch):
    class TritonError(Exception):  # neither a RuntimeError nor a ValueError
        pass

    def make_step(model, case):
        if case.name == "softpp-tiny-triton":
            raise TritonError("out of resources")

    monkeypatch.setattr(measure, "make_model", lambda case: None)
    monkeypatch.setattr(measure, "make_step", make_step)
    monkeypatch.setattr(measure, "seconds_of", lambda *_: 0.5)
    names = ("softpp-tiny-triton", "softpp-tiny")
    tiny = [cases.Case("backbone", name, (64, 64)) for name in names]
    times, skipped = measure.measure_times(tiny, {}, 1, 1, print)
    assert list(times) == tiny[1:]
    assert skipped == {tiny[0]: "TritonError: out of resources"}


def test_a_case_that_fails_later_does_not_stop_the_others(monkeypatch):
    """A kernel's error is that of a later call, when the GPU is waited for."""
    calls = {"softpp-tiny-triton": 0, "softpp-tiny": 0}

    def seconds(name, *_):
        calls[name] += 1
        if name == "softpp-tiny-triton" and calls[name] > 3:
            raise RuntimeError("an illegal memory access was encountered")
        return 0.1

    monkeypatch.setattr(measure, "make_model", lambda case: None)
    monkeypatch.setattr(measure, "make_step", lambda model, case: case.name)
    monkeypatch.setattr(measure, "seconds_of", seconds)
    both = [cases.Case("backbone", name, (64, 64)) for name in calls]
    times, skipped = measure.measure_times(both, {}, 3, 1, print)
    assert {case: found["repeats"] for case, found in times.items()} == {both[1]: 3}
    assert skipped == {both[0]: "RuntimeError: an illegal memory access was encountered"}


def test_versions_tell_that_of_triton(monkeypatch):
    real = measure.importlib.metadata.version
    monkeypatch.setattr(
        measure.importlib.metadata, "version", lambda n: "3.6.0" if n == "triton" else real(n)
    )
    assert measure.versions()["triton"] == "3.6.0"


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", ["softpp-tiny", "softpp-tiny-triton"])
def test_a_backward_pass_has_the_setting_of_the_forward_pass(name, dtype):
    """The precision of float32, and what operations run as."""
    product, found = OPERATIONS["gaussian_kernel_product"], []

    def look():
        found.append((torch.backends.cudnn.allow_tf32, product.asked, product.strict))

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            look()
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            look()
            return grad

    class Model(torch.nn.Linear):
        def forward(self, x):
            return [Look.apply(super().forward(x))]

    case = cases.Case("backbone", name, (4, 4), mode="train", dtype=dtype)
    cases.make_step(Model(4, 4), case)()
    wanted = (dtype == "tf32", "triton" if name.endswith("triton") else None, True)
    assert found == [wanted, wanted]
    assert product.asked is None


def test_backbones_with_kernels_say_why_they_cannot_run_here(monkeypatch):
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})  # as without Triton's interpreter
    case = cases.Case("backbone", "softpp-tiny-triton", (64, 64))
    times, skipped = measure.measure_times([case], {}, 1, 1, print)
    assert not times
    assert "cannot run as triton: " in skipped[case]


def test_memory_on_a_gpu_is_measured_in_the_same_process(monkeypatch):
    monkeypatch.setattr(measure, "_peak_cuda_mib", lambda step: len(step()))
    case = cases.Case("operator", "softpp", (8, 8), batch=3)
    model = cases.make_model(case)
    monkeypatch.setattr(measure, "make_model", lambda case: 1 / 0)
    assert measure.measure_on_gpu(case, model, False) == dict(peak_mib=3)
    found = measure.measure_on_gpu(case, model, True)
    assert found["peak_mib"] == 3
    assert found["error"] == "operations not counted: ZeroDivisionError: division by zero"


def test_peers_attention_runs_fused():
    """torch's layers do when nobody asks for the weights; the result is the same."""
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).train()
    x = torch.randn(1, 5, 8)
    with Calls() as calls:
        expected = layer(x, x, x)[0]
    assert not {name for name in calls.names if "scaled_dot_product" in name}
    cases.fuse_attention(layer)
    with Calls() as calls:
        torch.testing.assert_close(layer(x, x, x)[0], expected)
    assert {name for name in calls.names if "scaled_dot_product" in name}


@pytest.mark.parametrize("name", ["swin-tiny", "davit-tiny"])
@torch.no_grad()
def test_windows_of_peers_run_fused(name, monkeypatch):
    """Shifted windows and a padded last one too; the result is the same."""
    x = torch.randn(2, 3, 96, 160)
    fused = cases.make_backbone(name)
    monkeypatch.setattr(cases, "fuse_attention", lambda model: None)
    plain = cases.make_backbone(name)
    plain.load_state_dict(fused.state_dict())
    with Calls() as calls:
        expected = plain(x)
    assert not {name for name in calls.names if "scaled_dot_product" in name}
    with Calls() as calls:
        found = fused(x)
    assert {name for name in calls.names if "scaled_dot_product_flash" in name}
    # DaViT's attention between channels stays
    assert any("softmax" in name for name in calls.names) == (name == "davit-tiny")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_windows_of_peers_train_as_they_are():
    """torch's fused kernel has no gradient of the bias of positions on CPUs."""
    model = cases.make_backbone("swin-tiny", "train")
    with Calls() as calls:
        sum(y.sum() for y in model(torch.randn(1, 3, 64, 64))).backward()
    assert not {name for name in calls.names if "scaled_dot_product" in name}
    assert all(p.grad is not None for n, p in model.named_parameters() if "bias_table" in n)


@pytest.mark.parametrize("name", ["resnet-50", "resnet-101", "van-b1"])
@torch.no_grad()
def test_forward_passes_of_peers_are_without_batch_norm(name):
    """Folded into the convolutions before them where there are any; the result is the same."""
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    plain, folded = (cases.make_backbone(name, "train") for _ in range(2))
    for model in (plain, folded):
        model.eval()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    folded.load_state_dict(plain.state_dict())
    cases.fuse_conv_bn(folded)
    kinds = [type(layer) for layer in cases.make_backbone(name).modules()]
    count = sum(type(layer) is torch.nn.BatchNorm2d for layer in plain.modules())
    assert kinds.count(torch.nn.BatchNorm2d) < (1 if name.startswith("resnet") else count)
    for a, b in zip(folded(x), plain(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_targets(data):
    found = {target.claim: target for target in page.targets(data)}
    bounded = "SOFT++ Tiny, max_keys=2048:"
    answers = {claim: (round(t.measured, 3), t.met) for claim, t in found.items() if t.measured}
    assert answers == {
        "800x1344: Tiny's speed over the released algorithm's": (29.0, False),
        "800x1344: Tiny's peak memory over the released algorithm's": (0.125, True),
        "800x1344: SOFT++ Tiny's speed over PVTv2-B1's": (2.5, False),
        "800x1344: SOFT++ Tiny's speed over PVT-Tiny's": (2.19, False),
        "800x1344: SOFT++ Small's speed over Swin-T's": (1.5, False),
        "800x1344: share of the best matrix product that SOFT++ Tiny reaches": (0.667, True),
        "800x1344: SOFT++ Tiny's speed in bfloat16 over that in float32": (2.0, True),
        "800x1344, bfloat16: SOFT++ Small's speed over Swin-T's": (1.39, False),
        "training step, 512x512, batch 2: SOFT++ Tiny's speed over PVTv2-B1's": (0.9, False),
        "training step, 512x512, batch 2: SOFT++ Tiny's peak memory over PVTv2-B1's": (0.9, False),
        f"{bounded} time per pixel at 2048x2048 over 1024x1024": (1.2, True),
        f"{bounded} peak memory per pixel at 2048x2048 over 1024x1024": (
            1.0,
            True,
        ),
        f"{bounded} time per pixel at 4096x4096 over 1024x1024": (1.5, False),
        f"{bounded} peak memory per pixel at 4096x4096 over 1024x1024": (
            0.625,
            True,
        ),
        "800x1344: time with released landmarks and Newton over that with those by content": (
            1.5,
            True,
        ),
        "RetinaNet, 800x1344: speed with SOFT++ Tiny over PVTv2-B1": (1.2, True),
        "RetinaNet, 800x1344: speed with SOFT++ Small over Swin-T": (0.8, False),
    }
    assert [t for t in found.values() if t.measured is None and t.met is not None] == []
    rows = {row[0]: row[1:] for row in page.target_rows(data)}
    assert len(rows) == 1 + len(found) == 51
    row = rows["800x1344: SOFT++ Tiny's speed over PVT-Tiny's"]
    assert row == ["2.19", "2.19", "≥ 2.3", "**no**"]
    row = rows["800x1344: SOFT++ Small's speed over PVTv2-B2's"]
    assert row == ["-", "-", "≥ 3.2", "not measured"]


@pytest.fixture
def undrawn(monkeypatch):
    """No picture is written, which takes seconds, where a test reads the page alone."""
    monkeypatch.setattr(plots, "_save", lambda figure, path, commit=None: path)


@pytest.mark.usefixtures("undrawn")
def test_targets_of_a_gpu(data, tmp_path):
    """In each dtype, with kernels and without; the faster memory format of a peer."""
    kind = dict(device="cuda", batch=2)
    data["results"] = [
        measured("softpp-tiny", 10.0, 1.0, **kind),
        measured("pvtv2-b1", 9.0, 1.0, **kind),
        measured("softpp-tiny-triton", 5.0, 1.0, **kind),
        measured("softpp-tiny", 10.0, 1.0, mode="train", dtype="bfloat16", **kind),
        measured("pvtv2-b1", 40.0, 1.0, mode="train", dtype="bfloat16", **kind),
        measured("pvtv2-b1-channels-last", 30.0, 1.0, mode="train", dtype="bfloat16", **kind),
        measured("pvtv2-b1", 1.0, 1.0, (512, 512), **kind),  # no target is about this size
    ]
    data.update(scaling=[], whole=[])
    forward = "800x1344, batch 2, forward, cuda, float32: SOFT++ "
    train = "800x1344, batch 2, train, cuda, bfloat16: SOFT++ "
    found = {target.claim: (target.measured, target.met) for target in page.targets(data)}
    assert len(found) == 2 * 6
    assert {claim: value for claim, value in found.items() if value[0]} == {
        f"{forward}Tiny's speed over PVTv2-B1's": (0.9, False),
        f"{forward}Tiny, Triton's speed over PVTv2-B1's": (1.8, True),
        f"{train}Tiny's speed over PVTv2-B1's": (3.0, True),
    }
    assert found[f"{train}Small, Triton's speed over Swin-T's"] == (None, None)
    page.write_docs([data], tmp_path)
    text = " ".join((tmp_path / "benchmarks.md").read_text().split())
    assert f"{forward}Tiny, Triton's speed over PVTv2-B1's | 1.80 | 1.80 | ≥ 1 | yes |" in text


def test_bounds_of_the_targets(data):
    """None is lowered without this test."""
    found = {target.claim: (target.bound, target.at_most) for target in page.targets(data)}
    faster = "{}: {}'s speed over {}'s".format
    tiny, small, step = "SOFT++ Tiny", "SOFT++ Small", "training step, 512x512, batch 2"
    half = "800x1344, bfloat16"
    speeds = [
        ("800x1344", tiny, "PVTv2-B1", 3.0), ("800x1344", tiny, "PVT-Tiny", 2.3),
        ("800x1344", small, "PVTv2-B2", 3.2), ("800x1344", small, "Swin-T", 1.6),
        ("800x1344", small, "ConvNeXt-T", 1.3), ("800x1344", small, "ResNet-50", 1.15),
        ("224x224", tiny, "PVT-Tiny", 1.15), ("224x224", small, "ConvNeXt-T", 1.0),
        ("224x224", small, "Swin-T", 1.1), (step, tiny, "PVTv2-B1", 1.4),
        (step, small, "ConvNeXt-T", 1.4), (step, small, "Swin-T", 1.4),
        (step, small, "ResNet-50", 0.9), (half, small, "Swin-T", 1.4),
        (half, small, "ConvNeXt-T", 1.4), (half, small, "ResNet-50", 1.4),
    ]  # fmt: skip
    for where, ours, peer, bound in speeds:
        assert found[faster(where, ours, peer)] == (bound, False)
    assert found["800x1344: SOFT++ Tiny's speed in bfloat16 over that in float32"] == (1.8, False)
    claim = "800x1344: share of the best matrix product that SOFT++ Tiny reaches"
    assert found[claim] == (0.65, False)
    assert found[f"{step}: {tiny}'s peak memory over PVTv2-B1's"] == (0.5, True)
    for task in ("RetinaNet, 800x1344", "Mask R-CNN, 800x1344", "UperNet, 512x2048"):
        assert found[f"{task}: speed with {small} over Swin-T"] == (1, False)


def test_a_ratio_without_a_target_is_given_as_it_is(data):
    claim = "224x224: SOFT++ Small's speed over ResNet-50's"
    pair = (("softpp-small", 10.0), ("resnet-50", 8.0))
    data["results"] += [measured(name, time, 1.0, (224, 224)) for name, time in pair]
    rows = {row[0]: row[1:] for row in page.target_rows(data)}
    assert rows[claim] == ["0.800", "0.800", "-", "-"]
    rows = page.target_rows(dict(data, results=[]))  # those of backbones say nothing there
    assert "not measured" not in [row[-1] for row in rows]


def test_targets_of_sequences(data):
    kind = {key: data["results"][0][key] for key in report.KIND} | dict(label="")
    times = dict(
        softpp={512: 9.0, 2048: 10.0, 8192: 60.0},
        softmax={512: 2.0, 2048: 11.0, 8192: 50.0},
        performer={2048: 12.0, 8192: 30.0},
        nystromformer={512: 1.0, 8192: 24.0},
    )
    data["sequence"] = [
        dict(
            kind,
            name=name,
            tokens=tokens,
            median_ms=time,
            min_ms=time,
            mode="train",
            peak_mib=2 * time,
        )
        for name, found in times.items()
        for tokens, time in found.items()
    ]
    found = {target.claim: (target.measured, target.met) for target in page.targets(data)}
    mine = {claim: value for claim, value in found.items() if "tokens" in claim}
    assert mine == {
        "2048 tokens, train: SOFT++'s speed over that of softmax attention": (1.1, True),
        "8192 tokens, train: SOFT++'s speed over that of softmax attention": (50 / 60, False),
        "2048 tokens, train: SOFT++'s speed over the fastest linear one's, Performer": (1.2, None),
        "8192 tokens, train: SOFT++'s speed over the fastest linear one's, Nyströmformer, "
        "64 landmarks": (0.4, None),
        "8192 tokens, train: SOFT++'s time per token over that at 2048": (1.5, False),
        "2048 tokens, train: SOFT++'s peak memory over that of softmax attention": (10 / 11, True),
        "8192 tokens, train: SOFT++'s peak memory over that of softmax attention": (1.2, False),
        "8192 tokens, train: SOFT++'s peak memory per token over that at 2048": (1.5, False),
    }


def exported(backbone, runtime, median, size=(224, 224)):
    return measured(backbone, median, None, size, runtime=runtime)


def test_exported_backbones_beside_torch(data):
    """A table whose ratio is the time over torch's, and one target for each backbone."""
    data["onnx"] = entries = [
        exported("softpp-tiny", "torch 2", 100.0),
        exported("softpp-tiny", "onnxruntime 1", 40.0),
        exported("softpp-small", "torch 2", 200.0),
        exported("softpp-small", "onnxruntime 1", 110.0),
    ]
    entries.append(exported("softpp-tiny", "onnxruntime 1", 1.0, (800, 1344)))
    head, *rows = report.table(entries[:4])
    assert rows[1][0] == "SOFT++ Tiny, onnxruntime 1"
    columns = [dict(zip(head, row)) for row in rows]
    assert [row["min ms"] for row in columns] == ["100.0", "40.00", "200.0", "110.0"]
    assert [row["time / ours"] for row in columns] == ["1.00", "0.400", "1.00", "0.550"]
    found = {target.claim: (target.measured, target.met) for target in page.targets(data)}
    assert {claim: value for claim, value in found.items() if "torch" in claim} == {
        "224x224: SOFT++ Tiny's speed in onnxruntime over torch's": (2.5, True),
        "224x224: SOFT++ Small's speed in onnxruntime over torch's": (200 / 110, False),
    }


@pytest.mark.long
def test_a_run_of_exported_backbones(command, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = command("--onnx", "64", "--repeats", "2", "--threads", "1", "--out", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads((tmp_path / "out/benchmark.json").read_text())
    found = [(e["backbone"], e["runtime"].partition(" ")[0], e["size"]) for e in data["onnx"]]
    assert found == [
        (f"softpp-{arch}", runtime, [64, 64])
        for arch in ("tiny", "small")
        for runtime in ("torch", "onnxruntime")
    ]
    for entry in data["onnx"]:
        assert 0 < entry["min_ms"] <= entry["median_ms"]
    assert data["skipped"] == []
    done = command("--write-docs", "out/benchmark.json", "--out", "docs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "### Exported to ONNX" in (tmp_path / "docs/benchmarks.md").read_text()


def test_plots_of_every_operator_and_sequence_model(data, tmp_path):
    kind = {key: data["results"][0][key] for key in report.KIND} | dict(peak_mib=1.0)
    for section, table in (("operator", cases.OPERATORS), ("sequence", cases.SEQUENCES)):
        data[section] = [
            dict(kind, name=name, label=label, tokens=n, median_ms=n, min_ms=n - 9, q90_ms=n + 9)
            for name, (label, _) in table.items()
            for n in (512, 1024)
        ]
    names = plots.plot(dict(data, results=[], scaling=[], whole=[]), tmp_path)
    assert names["sequence"] == ["sequence.png", "sequence_memory.png"]
    assert names["operator"] == ["operator.png", "memory.png"]
    assert set(cases.OPERATORS) | set(cases.SEQUENCES) <= set(plots.STYLES)
    for name in (*names["sequence"], *names["operator"]):
        assert cv2.imread(str(tmp_path / name)).std() > 10


SEQUENCE_LAYERS = dict(
    softpp="SequenceAttention",
    softmax="SoftmaxSequenceAttention",
    gaussian="GaussianSequenceAttention",
    linformer="LinformerSelfAttention",
    performer="SelfAttention",
    nystromformer="NystromAttention",
    none="NoSequenceAttention",
)


@pytest.mark.parametrize("name", cases.SEQUENCES)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_steps_of_sequence_models(name, mode):
    case = cases.Case("sequence", name, (1, 96), mode=mode)
    try:
        model = cases.make_model(case)
    except ImportError as error:
        pytest.skip(str(error))
    cases.make_step(model, case)()
    assert model.max_length == 96
    for attn in (block.attn for block in model.blocks):
        layer = getattr(attn, "layer", attn)
        assert type(layer).__name__ == SEQUENCE_LAYERS[name]
        if name == "softpp":
            landmarks = attn.sample_landmarks(torch.zeros(1, 96, 64))[0]
            assert landmarks.shape == (1, 2, 48, 32)  # of 2 tokens: at most 64 of 96
            assert (attn.normalize, attn.solver) == (True, "direct")
        if name == "nystromformer":
            assert layer.num_landmarks == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: json.dumps(data)[:-1], "delimiter"),
        (lambda data: "5", "not iterable"),
        (lambda data: "[]", "it lacks device"),
        (lambda data: json.dumps({**data, "results": [5]}), "not iterable"),
        (lambda data: json.dumps({**data, "operator": [{}]}), "under 'operator' lacks device"),
    ],
)
def test_other_files_are_refused(data, tmp_path, change, words):
    path = tmp_path / "other.json"
    path.write_text(change(data))
    with pytest.raises(ValueError, match=rf"other\.json is not the benchmark's JSON: .*{words}"):
        report.read_json(path)


def test_a_group_measured_again_replaces_the_old_one(data):
    again = dict(data, scaling=[], whole=[], command="y", date="2026-02-01T00:00")
    again["results"] = [measured("softpp-tiny", 50.0, 1.0, (512, 512), 2, "train")]
    (merged,) = report.merge([data, again])
    assert (merged["command"], merged["date"][:10]) == ("x\ny", "2026-02-01")
    assert merged["scaling"] == data["scaling"]
    assert merged["results"] == data["results"][:7] + again["results"] + data["results"][9:]
    assert len(data["results"]) == 14  # arguments are unchanged
    assert len(report.merge([data, dict(again, device="another")])) == 2


@pytest.mark.usefixtures("undrawn")
def test_shares_are_of_the_limits_of_the_run_that_measured(data, tmp_path):
    slower = dict(data, scaling=[], whole=[], ceilings=dict(float32_tflops=0.5))
    slower["results"] = [measured("softpp-small", 400.0, 1.0, gmacs=50.0, traffic_gib=1.0)]
    slower["results"][0]["batch"] = 2  # another group
    data["results"][0]["traffic_gib"] = 1.0
    page.write_docs([data, slower], tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    limits = "1.50 TFLOP/s in float32 matrix products; 0.500 TFLOP/s in float32 matrix products."
    assert f"as measured in each run: {limits}" in text
    for name, share in (("| SOFT++ Tiny ", " 67 % "), ("| SOFT++ Small ", " 100 % ")):
        assert any(name in line and share in line for line in text.splitlines())


def test_backbones_are_points_with_intervals_both_formats_in_a_row(data):
    results = [entry for entry in data["results"][:7] if entry["backbone"] != "released-tiny"]
    results.append(measured("swin-tiny-channels-last", 290.0, 30.0, min_ms=280.0, q90_ms=310.0))
    time, memory = plots.draw_backbones(results, "by content").axes
    rows = [label.get_text() for label in time.get_yticklabels()]
    assert rows[:2] == ["SOFT++ Tiny", "SOFT++ Tiny, Newton"]
    assert rows[-2:] == ["SOFT++ Small", "Swin-T"]
    y = rows.index("Swin-T")
    points = [xy for line in time.lines for xy in line.get_xydata().tolist()]
    assert [290.0, y] in points
    assert [300.0, y] in points
    spans = [path.vertices.tolist() for c in time.collections for path in c.get_paths()]
    assert [[280.0, y], [310.0, y]] in spans
    assert {text.get_text() for text in time.texts} >= {"290", "100"}  # the lesser of two formats
    assert "300" not in {text.get_text() for text in time.texts}
    (lesser,) = (text for text in time.texts if text.get_text() == "290")
    assert (lesser.xy, lesser.get_ha()) == ((280.0, y), "right")  # on the side of that point
    assert "30.0" in {text.get_text() for text in memory.texts}
    (legend,) = time.figure.legends
    words = [text.get_text() for text in legend.texts]
    assert "SOFT++ (ours), at most 49 landmarks, by content" in words
    assert "minimum to the 90 % quantile" in legend.get_title().get_text()


def test_drawings_beside_the_pictures_are_the_same_every_time(data, tmp_path):
    kept = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        names = plots.plot(dict(data, whole=[]), folder)
        kept.append({n: Path(folder, n).with_suffix(".svg").read_bytes() for n in names["scaling"]})
    assert kept[0] == kept[1]
    assert b"SOFT++ Tiny, at most 49 landmarks, default max_keys=2048" in kept[0]["scaling.png"]


def test_drawings_round_coordinates_and_no_numbers_that_are_read(tmp_path):
    figure = plots.new_figure(2, 2)
    axis = figure.subplots()
    axis.plot([0, 1 / 3], [0, 1 / 7])
    axis.annotate("0.0625", (0.2, 0.1))
    plots._save(figure, tmp_path / "a.png")
    text = (tmp_path / "a.svg").read_text()
    assert ">0.0625<" in text
    assert not re.search(r' d="[^"]*\d\.\d\d', text)


def test_softmax_with_its_matrix_stored_is_softmax():
    tokens = 9
    layers = [cases.OPERATORS[name][1](tokens) for name in ("softmax", "softmax-materialised")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, tokens, cases.DIMS)
    torch.testing.assert_close(layers[1](x), layers[0](x))
    with Calls() as calls:
        layers[1](x)
    assert not {name for name in calls.names if "scaled_dot_product" in name}
    with pytest.raises(ValueError, match=r"256000 tokens would take .* GiB"):
        cases.OPERATORS["softmax-materialised"][1](256000)


def test_the_way_from_the_release_to_ours_is_one_table_with_accuracy_beside(data):
    settings = (("softpp-tiny-newton-all", 2000.0), ("softpp-tiny-direct-49", 110.0))
    data["results"] += [measured(name, time, 1.0) for name, time in settings]
    row = dict(size=[800, 1344], mIoU=40.0, landmarks=1050)
    by_content = dict(row, model="by content", solver="none", budget=49, landmarks=49)
    released = dict(row, model="released, BatchNorm", solver="newton")
    rows = [
        dict(released, budget="all"),
        dict(released, budget="all", size=[512, 512], mIoU=1.0),
        dict(by_content, mIoU=90.0),
        dict(by_content, mIoU=94.0),
        dict(model="by content", solver="none", budget=49, size=[800, 1344], landmarks=49, AP=1),
    ]
    head, *found = page.steps_table(data, rows)
    columns = [dict(zip(head, row)) for row in found]
    assert [row[""] for row in columns] == [
        "SOFT++ Tiny, released algorithm",
        "SOFT++ Tiny, Newton, all landmarks",
        "SOFT++ Tiny, direct, 49 landmarks",
        "SOFT++ Tiny",
    ]
    assert [row["landmarks"] for row in columns] == ["1050", "1050", "49", "at most 49"]
    assert [row["times as fast"] for row in columns] == ["1.00", "1.45", "26.4", "29.0"]
    assert [row["times the step before"] for row in columns] == ["1.00", "1.45", "18.2", "1.10"]
    assert [row["mIoU (%)"] for row in columns] == ["-", "40.0", "-", "92.0 (90.0-94.0)"]
    data["results"] = data["results"][:-2]
    assert len(page.steps_table(data, rows)) == 1


def test_the_page_and_its_plots_are_current(root, tmp_path):
    shutil.copy(root / "docs/landmark_budgets.json", tmp_path)
    runs = sorted((root / "docs/benchmarks").glob("*.json"))
    page.write_docs([report.read_json(path) for path in runs], tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    again = "run python -m mmsoft.benchmark --write-docs docs/benchmarks/*.json"
    assert text == (root / "docs/benchmarks.md").read_text(), again
    assert "-dirty" not in text
    drawn, kept = (
        {path.name: cv2.imread(str(path)).shape for path in (folder / "benchmarks").glob("*.png")}
        for folder in (tmp_path, root / "docs")
    )
    assert drawn == kept


def test_figures_of_the_papers(command, data, tmp_path):
    speeds = {"softpp-tiny": 8.0, "soft-tiny": 9.0, "other": 7.0}
    data["results"] = [
        measured(name, 1000 / speed, 1.0, (224, 224), mode=mode)
        for name, speed in speeds.items()
        for mode in ("forward", "train")
    ]
    uncounted = measured("pvt-tiny", 1.0, 1.0, (224, 224))  # as after a failed measurement
    del uncounted["params_m"]
    data["results"].append(uncounted)
    kind = {key: data["results"][0][key] for key in report.KIND}
    layer = dict(kind, name="softpp", label="SOFT++", median_ms=1.0)
    data["operator"] = [dict(layer, tokens=n, peak_mib=n / 100) for n in (256, 512)]
    report.write_json(data, tmp_path / "b.json")
    done = command("plot", "b.json", "--out-dir", "figures")
    assert done.returncode == 0
    assert done.stdout.split() == ["figures/memory.png", "figures/tradeoff.png"]
    assert done.stderr == "not drawn, no published accuracy known: other\n"
    pictures = [cv2.imread(str(tmp_path / "figures" / f"{n}.png")) for n in ("memory", "tradeoff")]
    assert [picture.shape for picture in pictures] == [(880, 1200, 3), (1080, 2200, 3)]
    assert all(picture.std() > 10 for picture in pictures)
    drawing = (tmp_path / "figures/tradeoff.svg").read_text()
    words = "SOFT++: speed with at most 49 landmarks, released, with the direct solver; accuracy of"
    assert f"{words} the released weights, Newton<" in drawing

    report.write_json({**data, "operator": [], "results": [uncounted]}, tmp_path / "b.json")
    done = command("plot", "b.json")
    assert done.returncode == 2
    assert "has neither operators with a peak" in done.stderr
    assert done.stderr.count("\n") == 1


def test_published_accuracies_are_of_our_metafile_and_the_peers_papers():
    found = cases.published()
    archs = ("tiny", "small", "medium", "large", "huge")
    ours = {f"{variant}-{arch}" for variant in ("soft", "softpp") for arch in archs}
    assert set(found) == ours | set(PEERS)
    assert all(75 < accuracy < 85 for accuracy in found.values())


# -------------------------------------------------------------------- the tree against a commit


@pytest.mark.parametrize(
    ("factor", "drift", "word"),
    [
        *((1.2, 1.0, "slower"), (0.8, 1.0, "faster"), (1.0, 1.0, "same")),
        *((1.05, 1.08, "same"), (1.2, 1.3, "too noisy")),
    ],
)
def test_a_change_counts_beyond_the_noise_between_equal_processes(factor, drift, word):
    g = np.random.default_rng(0)
    tree, commit, again = g.normal(1, 0.02, (3, 15)) * g.uniform(1, 2, 15)  # rounds differ
    change, noise, found = compare.verdict(factor * tree, commit, drift * again)
    assert found == word
    assert noise >= abs(drift - 1) - 0.03
    assert change == pytest.approx(factor / ((1 + drift) / 2) - 1, abs=0.16)


@pytest.mark.parametrize(("factor", "word"), [(1.3, "slower"), (1.0, "same"), (0.7, "faster")])
def test_what_got_slower_is_told_and_fails(monkeypatch, capsys, tmp_path, factor, word):
    """Of the working tree, not of the commit."""

    class Worker:
        def __init__(self, tree, cases, threads):
            self.factor = factor if tree == compare.ROOT else 1.0

        def answer(self):
            return ""

        def seconds(self, case):
            return self.factor * (1 + case)

        def stop(self):
            pass

    monkeypatch.setattr(compare, "Worker", Worker)
    monkeypatch.setattr(compare, "tree_of", lambda commit: nullcontext(tmp_path))
    assert compare.compare("abc", 5, 1) == (word != "slower")
    monkeypatch.setattr(compare, "verdict", lambda *seconds: (0.0, 0.3, "too noisy"))
    assert not compare.compare("abc", 1, 1)  # a guard that cannot tell does not pass
    captured, _, noisy = capsys.readouterr().out.partition("\n   round 1 of 1")
    assert "repeat it on an idle machine" in noisy
    rows = [line for line in captured.splitlines() if line.startswith("| softpp")]
    assert len(rows) == len(compare.CASES)
    assert all(row.split("|")[-2].strip() == word for row in rows)
    assert [cell.strip() for cell in rows[0].split("|")[2:4]] == ["1000.0", f"{1000 * factor:.1f}"]


def test_comparing_with_no_commit_is_one_line(command):
    done = command("compare", "no-such-commit")
    assert done.returncode == 2
    assert "rev-parse --verify no-such-commit^{commit} failed" in done.stderr


@pytest.mark.long
def test_a_tree_is_compared_with_its_own_commit(capsys, root):
    before = sorted((root / ".git").rglob("worktrees/*"))
    case = dict(section="operator", name="softpp", size=[8, 8])
    compare.compare("HEAD", 3, 1, [case])
    assert "softpp, 8x8, forward" in capsys.readouterr().out
    assert sorted((root / ".git").rglob("worktrees/*")) == before


class Twice(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return 2 * self.linear(x)


def test_what_is_compiled_is_compiled_however_many_there_are():
    """torch runs the ninth module, whose code is that of the others, as it is."""
    import torch._dynamo.config as config

    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        cases.compile_or_fail()
        for width in range(2, 14):
            module = Twice(width)
            module.compile(backend=backend, dynamic=False)
            module(torch.ones(1, width))
    assert len(compiled) == 12
