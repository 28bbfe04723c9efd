"""Detectors with their post-processing as ONNX files, compared with MMDetection's."""

import copy
import re

import numpy as np
import pytest
import torch
from mini_models import DENSE_HEADS, LIBRARIES, STRIDES, import_library
from mmengine.config import Config, ConfigDict
from operators import needs_torch_2_6
from released import SMALL

from mmsoft.builder import build_model
from mmsoft.export import Input, export_onnx, export_program, exportable
from mmsoft.export.detections import compare_detections, detections, sizes_of_images
from mmsoft.export.onnx import start
from mmsoft.export.program import TOLERANCE, differences_of, refuse

import_library("mmdet")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmsoft.export import functions  # noqa: E402  (needs onnxscript)

pytestmark = needs_torch_2_6

TOOL = "deployment/export_onnx.py"
SIZE = (96, 128)
MOST = 60
HEADS = {
    "RetinaNet": dict(loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True)),
    "FCOS": DENSE_HEADS["FCOSHead"],
    "ATSS": DENSE_HEADS["ATSSHead"],
    "softmax": dict(loss_cls=dict(type="mmdet.CrossEntropyLoss")),
}


# Of the first stage alone, a detector is exported in a third of the time.
FIRST = dict(out_indices=(0,))


def build(kind="RetinaNet", test_cfg=(), backbone=(), **head):
    """A detector of random weights whose boxes are many, and overlap, with scores of 0 to 1."""
    model = LIBRARIES["mmdet"](max_landmarks=9, **dict(backbone))
    model["backbone"]["arch"] = SMALL
    options = dict(HEADS.get(kind, dict()), **head)
    if "type" in options:
        model["type"] = "mmdet.SingleStageDetector"
        model["bbox_head"] = dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1)
    model["bbox_head"].update(options)
    model["test_cfg"] = dict(
        nms_pre=100,
        min_bbox_size=0,
        score_thr=0.6,
        nms=dict(type="nms", iou_threshold=0.3),
        max_per_img=MOST,
    )
    model["test_cfg"].update(dict(test_cfg))
    torch.manual_seed(0)
    model = build_model(ConfigDict(default_scope="mmdet", model=model)).eval()
    for name, parameter in model.bbox_head.named_parameters():
        if name.endswith(("_cls.weight", "_centerness.weight")):
            torch.nn.init.normal_(parameter, std=0.015)
        elif name.endswith("_reg.weight"):
            torch.nn.init.normal_(parameter, std=0.006)
        elif name.endswith("_cls.bias"):
            torch.nn.init.constant_(parameter, -1.0)
        elif name == "conv_reg.bias":  # distances of which this is the logarithm
            torch.nn.init.constant_(parameter, 2.5)
    return model


def predictions(model, images, sizes=None, **changes):
    """Of MMDetection alone: boxes, scores and labels of each image, (height, width) of a batch."""
    from mmdet.structures import DetDataSample

    head = model.bbox_head
    before, head.test_cfg = head.test_cfg, ConfigDict(head.test_cfg, **changes)
    sizes = sizes or [tuple(images.shape[2:])] * len(images)
    samples = [DetDataSample(metainfo=dict(img_shape=size)) for size in sizes]
    with torch.no_grad():
        found = model.predict(images, samples, rescale=False)
    head.test_cfg = before
    return [
        (f.pred_instances.bboxes, f.pred_instances.scores, f.pred_instances.labels) for f in found
    ]


def check(model, dets, labels, images, sizes=None):
    """The same detections in the same order, then nothing."""
    expected = predictions(model, images, sizes)
    for boxes, scores, classes, det, label in zip(*zip(*expected), dets, labels, strict=True):
        count = len(scores)
        torch.testing.assert_close(det[:count, :4], boxes, rtol=0, atol=2e-3)
        torch.testing.assert_close(det[:count, 4], scores, rtol=0, atol=1e-5)
        assert torch.equal(label[:count], classes)
        assert not det[count:].any()
        assert (label[count:] == -1).all()
    return [len(scores) for _, scores, _ in expected]


@pytest.mark.parametrize(
    "test_cfg",
    [
        dict(),
        dict(nms=dict(type="nms", iou_threshold=0.5, class_agnostic=True)),
        dict(max_per_img=5, nms_pre=7),
        dict(score_thr=0.999999),
        dict(min_bbox_size=30),
        dict(max_per_img=10_000, nms_pre=5_000, score_thr=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", HEADS)
def test_the_module_finds_what_the_model_does(kind, test_cfg):
    """In torch, to the last bit: rounding included, with each option of post-processing."""
    model = build(kind, test_cfg)
    module = exportable(model, postprocess=True)
    images = Input().images(2, SIZE)
    with torch.no_grad():
        dets, labels = module(images)
    counts = check(model, dets, labels, images)
    dets_difference, labels_difference = module.differences(images, [dets, labels], 1e-7)
    assert dets_difference.found == sum(counts)
    assert labels_difference.error == 0


def test_boxes_end_where_the_padding_begins():
    """As in ``predict``, which knows the sizes; what lies in padding alone suppresses nothing."""
    images, sizes = Input().images(2, SIZE), [(60, 128), (96, 77)]
    images[0, :, 60:] = 0
    images[1, :, :, 77:] = 0
    for kind in ("RetinaNet", "FCOS"):
        model = build(kind)
        module = exportable(model, postprocess=True)
        with torch.no_grad():
            dets, labels = module(images)
        assert min(check(model, dets, labels, images, sizes)) > 0
        borders = torch.tensor(sizes).flip(1).repeat(1, 2)[:, None]
        assert (dets[..., :4] <= borders).all()
        uncut = predictions(model, images)  # which are others
        assert any((boxes > border).any() for (boxes, *_), border in zip(uncut, borders))
    model.backbone.ignore_padding = False
    with torch.no_grad():
        dets, labels = exportable(model, postprocess=True)(images)
    check(model, dets, labels, images)


@pytest.fixture(scope="module")
def program(request, tmp_path_factory):
    """A detector, its file for two images, and how far apart they were."""
    model = build(request.param)
    path = tmp_path_factory.mktemp("program") / "model.onnx"
    return model, path, export_onnx(exportable(model, postprocess=True), Input(SIZE, batch=2), path)


KINDS = ["RetinaNet", pytest.param("FCOS", marks=pytest.mark.long)]


@pytest.mark.parametrize("program", KINDS, indirect=True)
def test_program_of_a_detector(program):
    """Two images with different numbers of objects, of which far more overlap."""
    model, path, differences = program
    assert [d.name for d in differences] == ["dets", "labels"] * 2
    assert [d.padded for d in differences] == [False, False, True, True]
    assert min(differences[0].found, differences[2].found) > 0
    assert [d.shape for d in differences] == [(2, MOST, 5), (2, MOST)] * 2
    assert max(d.error for d in differences) < 1e-5  # 2e-6 measured
    images = Input().images(2, SIZE)
    some, every = (predictions(model, images, **change) for change in CHANGES)
    dets, labels = map(torch.as_tensor, start(path).run(None, {"images": images.numpy()}))
    assert dets.dtype == torch.float32
    assert labels.dtype == torch.int64
    counts = check(model, dets, labels, images)
    assert 0 < min(counts) < max(counts) < MOST
    assert {*labels.unique().tolist()} == {-1, 0, 1}
    assert len(every[0][1]) > 2 * len(some[0][1])  # without suppression
    assert differences[0].found == sum(counts)
    images[0, :, 70:] = images[1, :, :, 100:] = 0
    dets, labels = map(torch.as_tensor, start(path).run(None, {"images": images.numpy()}))
    assert min(check(model, dets, labels, images, [(70, 128), (96, 100)])) > 0
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert [value.name for value in file.graph.output] == ["dets", "labels"]
    assert {node.domain for node in file.graph.node} == {""}
    assert [n.op_type for n in file.graph.node].count("NonMaxSuppression") == 1


CHANGES = [dict(), dict(nms=dict(type="nms", iou_threshold=1.0), max_per_img=100_000)]


@pytest.mark.long
@pytest.mark.parametrize("kind", HEADS)
def test_programs_of_any_size(tmp_path, kind):
    model = build(kind)
    module = exportable(model, postprocess=True)
    path = tmp_path / "model.onnx"
    inputs = Input((128, 160), batch=2, dynamic_batch=True, dynamic_size=True)
    differences = export_onnx(module, inputs, path)
    assert max(d.error for d in differences) < 1e-5
    assert len({d.images for d in differences}) == 6
    assert min(d.found for d in differences if d.name == "dets") > 0
    images = Input().images(4, (161, 203))  # which nothing else chose
    dets, labels = map(torch.as_tensor, start(path).run(None, {"images": images.numpy()}))
    assert min(check(model, dets, labels, images)) > 0


@pytest.mark.long
def test_command_with_a_config(root, tmp_path, run_tool):
    """RetinaNet for blood cells, at its own size, with weights that find something."""
    path = root / "configs/bccd/retinanet_softpp-mini_fpn_bccd.py"
    torch.manual_seed(0)
    model = build_model(Config.fromfile(path)).eval()
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.1)
    torch.nn.init.normal_(model.bbox_head.retina_reg.weight, std=0.02)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    out = tmp_path / "model.onnx"
    options = ["--postprocess", "--shape", "240", "320", "--batch", "2", "--out", out]
    status, printed, errors = run_tool(TOOL, path, tmp_path / "model.pth", *options)
    assert status == 0, errors
    cells = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in cells[2:]]
    for padded, first, second in zip(("no", "yes"), rows[::2], rows[1::2], strict=True):
        assert first[:4] == ["2x3x240x320", padded, "dets", "2x100x5"]
        assert second[:5] == ["2x3x240x320", padded, "labels", "2x100", "0.0e+00"]
        assert int(first[5].split()[0]) > 20
    images = Input().images(2, (240, 320)).flip(3)  # which the command has not seen
    dets, labels = map(torch.as_tensor, start(out).run(None, {"images": images.numpy()}))
    assert min(check(model, dets, labels, images)) > 0


def test_command_without_detections(tmp_path, run_tool):
    """The file is compared with a lower threshold."""
    model = LIBRARIES["mmdet"](max_landmarks=9, **FIRST)
    model["backbone"]["arch"] = SMALL
    model["test_cfg"]["nms"]["iou_threshold"] = 0.5
    model["test_cfg"]["score_thr"] = 0.99
    config, out = tmp_path / "config.py", tmp_path / "model.onnx"
    config.write_text(f"default_scope = 'mmdet'\nmodel = {model!r}\n")
    options = ["--postprocess", "--shape", "64", "--out", out]
    status, printed, errors = run_tool(TOOL, config, *options)
    assert status == 0, errors
    last = [line for line in printed.splitlines() if line.startswith("|")][-2]
    found, padded = re.search(r"\| yes .* \| (\d+) detections.* at score_thr=(\S+) ", last).groups()
    assert int(found) > 0
    assert float(padded) < 0.99
    assert "| 0 detections" in printed
    (threshold,) = (t for t in onnx.load(out).graph.initializer if t.name == "score_thr")
    assert onnx.numpy_helper.to_array(threshold) == np.float32(0.99)  # the config's all the same
    for more, message in (
        (["--part", "backbone"], "--postprocess takes the whole model, not --part backbone"),
        (["--cfg-options", "model.test_cfg.nms.type=soft_nms"], "ONNX has no soft_nms"),
    ):
        out.unlink(missing_ok=True)
        status, _, errors = run_tool(TOOL, config, *options, *more)
        assert status != 0
        assert message in errors
        assert not out.exists()


@pytest.mark.parametrize("program", KINDS, indirect=True)
def test_an_image_without_objects_and_one_with(program):
    """Scores of the first are all below the threshold, a constant of the file."""
    model, path, _ = program
    module = exportable(model, postprocess=True)
    images = Input().images(2, SIZE)
    with torch.no_grad():
        best = [s.sigmoid().flatten(1).amax(1) for s in model(images, mode="tensor")[0]]
    threshold = float(torch.stack(best).amax(0).mean())
    file = onnx.load(path)
    (constant,) = (tensor for tensor in file.graph.initializer if tensor.name == "score_thr")
    constant.CopyFrom(onnx.numpy_helper.from_array(np.array(threshold, np.float32), constant.name))
    outputs = start(file.SerializeToString()).run(None, {"images": images.numpy()})
    with module.with_threshold(threshold):
        differences = differences_of(module, images, outputs, TOLERANCE)
        counts = check(model, *map(torch.as_tensor, outputs), images)
    refuse(differences, TOLERANCE)
    assert differences[0].found == sum(counts)
    assert min(counts) == 0
    assert max(counts) > 0


def test_a_program_that_is_wrong_where_nothing_is_found_is_refused(tmp_path, monkeypatch):
    """Which a comparison with the config's threshold alone cannot see."""
    model = build(test_cfg=dict(score_thr=0.999999), backbone=FIRST)
    module = exportable(model, postprocess=True)
    monkeypatch.setattr(
        functions,
        "suppress",
        lambda boxes, *_: functions.op.Cast(
            functions.op.ReduceMax(boxes, functions.op.Constant(value_ints=[2]), keepdims=0), to=9
        ),
    )
    with pytest.raises(ValueError, match=r"not by rounding .*; nothing was written"):
        export_onnx(module, Input((64, 64)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_without_suppression_is_refused():
    """Which shows, too, that boxes of the comparison are suppressed."""
    module = exportable(build(), postprocess=True)
    images = Input().images(2, SIZE)
    suppressed, module.head.test_cfg.nms = module.head.test_cfg.nms, CHANGES[1]["nms"]
    with torch.no_grad():
        found = module(images)
    module.head.test_cfg.nms = suppressed
    with pytest.raises(ValueError, match=r"not by rounding .*; nothing was written"):
        module.differences(images, found, 1e-4)


# --------------------------------------------------------------------------- the comparison alone


@pytest.fixture(scope="module")
def case():
    """A module, images and what it finds there; a test changes a copy."""
    module = exportable(build(), postprocess=True)
    images = Input().images(1, SIZE)
    with torch.no_grad():
        return module, images, module(images)


def remade(case, change):
    """The difference that the comparison finds after a change of both outputs."""
    module, images, (dets, labels) = case
    dets, labels = dets.clone(), labels.clone()
    change(dets, labels)
    return module.differences(images, [dets.numpy(), labels.numpy()], 1e-4)


def drop(row):
    def change(dets, labels):
        for each, empty in ((dets, 0), (labels, -1)):
            each[0, row:-1] = each[0, row + 1 :].clone()
            each[0, -1] = empty

    return change


def move(pixels):
    def change(dets, labels):
        dets[0, 0, 0] += pixels

    return change


def relabel(dets, labels):
    labels[0, 0] = 1 - labels[0, 0]


def score(dets, labels):
    dets[0, 3, 4] *= 0.99


def not_a_number(dets, labels):
    dets[0, 1, 2] = torch.nan


@pytest.mark.parametrize(
    "change",
    [drop(0), drop(2), move(0.02), move(5), relabel, score, not_a_number],
    ids=["first", "third", "0.02 px", "5 px", "label", "score", "nan"],
)
def test_a_detection_that_is_another(case, change):
    with pytest.raises(
        ValueError, match=r"[12] are not, within 0.0001, in the other, [12] of them"
    ):
        remade(case, change)


def test_what_follows_the_detections(case):
    def change(dets, labels):
        dets[0, -1, 0] = 1

    with pytest.raises(ValueError, match="not zeros with labels of -1"):
        remade(case, change)


def test_small_differences_and_another_order(case):
    """Both are what rounding does."""

    def change(dets, labels):
        dets[0, :, :4] += 5e-3 * (labels[0, :, None] >= 0)
        dets[0, [0, 1]] = dets[0, [1, 0]]
        labels[0, [0, 1]] = labels[0, [1, 0]]

    dets, labels = remade(case, change)
    assert dets.error == pytest.approx(5e-3 / 128, rel=0.01)
    assert labels.error == 0
    assert dets.note == f"{dets.found} detections"


# Anchors of 32 pixels in row 12 of the finest level: A and B overlap by 0.6, and so do B and C; A
# and C by 1/3, D with none.
A, B, C, D = 6, 8, 10, 26


def written(logits):
    """What a head says of 96x128 pixels, with logits of class 0 at some columns of that row."""
    shapes = [(-(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    scores = [torch.full((1, 2, *shape), -20.0) for shape in shapes]
    for column, logit in logits.items():
        scores[0][0, 0, 12, column] = logit
    return scores, [torch.zeros(1, 4, *shape) for shape in shapes]


@pytest.mark.parametrize("slight", [1e-6, 1e-2])
@pytest.mark.parametrize("reason", ["threshold", "order", "overlap", "last"])
def test_what_rounding_decides_is_no_difference(reason, slight):
    """The program disagrees on one candidate, by much or by 1e-6: then in what follows, too."""
    more, less = slight, -slight
    model = build(test_cfg=dict(nms=dict(type="nms", iou_threshold=0.5)))
    head, other = model.bbox_head, copy.deepcopy(model.bbox_head)
    logits = {A: (2.0, 2.0), D: (1.0, 1.0)}
    if reason == "threshold":
        logits[D] = (0.405465 + 8 * more, 0.405465 + 8 * less)  # of 0.6
    elif reason == "order":  # which of A and B suppresses the other; B suppresses C
        logits = {A: (2.0 + more, 2.0), B: (2.0, 2.0 + more), C: (1.5, 1.5), D: (1.0, 1.0)}
    elif reason == "overlap":
        logits[B] = (1.5, 1.5)
        head.test_cfg.nms.iou_threshold = 0.6 + 10 * more
        other.test_cfg.nms.iou_threshold = 0.6 + 10 * less
    else:
        head.test_cfg.max_per_img = other.test_cfg.max_per_img = 1
        logits = {A: (2.0 + more, 2.0), D: (2.0, 2.0 + more)}
    ours, theirs = (written({c: pair[i] for c, pair in logits.items()}) for i in (0, 1))
    images = torch.zeros(1, 3, *SIZE)
    sizes = sizes_of_images(images, padded=True)
    found = detections(other, theirs, sizes, other.test_cfg.score_thr)
    if slight > 1e-4:
        with pytest.raises(ValueError, match="not by rounding"):
            compare_detections(head, images, sizes, ours, found, 1e-4)
        return
    dets, _ = compare_detections(head, images, sizes, ours, found, 1e-4)
    assert dets.error <= 1e-6
    numbers = dict(threshold=(2, 1), order=(3, 3), overlap=(3, 1), last=(1, 2))[reason]
    assert dets.note == "{} detections, {} decided by rounding".format(*numbers)


def test_the_operator():
    """Each image by itself, at most two boxes, and the shape that torch is told."""
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 8, 8]]).float()
    scores = torch.tensor([[0.5, 0.6, 0.1, -1], [-1, -1, -1, -1], [0.0, -1, 0.2, 0.3]])
    arguments = boxes.expand(3, 4, 4).clone(), scores, 0.5, 2
    kept = torch.ops.mmsoft_export.suppress(*arguments)
    assert kept.long().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    suppress = torch.ops.mmsoft_export.suppress.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(suppress, arguments, test_utils=tests)


# ------------------------------------------------------------------------------------- refusals

GFL = dict(HEADS["ATSS"], type="mmdet.GFLHead")
GFL.pop("bbox_coder")
BUCKETS = dict(type="mmdet.FSAFHead", bbox_coder=dict(type="mmdet.TBLRBBoxCoder"))
SOFT = dict(nms=dict(type="soft_nms", iou_threshold=0.5))


@pytest.mark.parametrize(
    ("head", "test_cfg", "message"),
    [
        (
            DENSE_HEADS["YOLOXHead"],
            dict(),
            "YOLOXHead has a post-processing of its own, predict_by_feat, _bbox_post",
        ),
        (GFL, dict(), "GFLHead has a post-processing of its own, _predict_by_feat_single; export"),
        (dict(bbox_coder=BUCKETS["bbox_coder"]), dict(), "RetinaHead decodes boxes with TBLRBBox"),
        (dict(), SOFT, "ONNX has no soft_nms, which test_cfg.nms asks for; export it without"),
        (dict(), dict(nms=dict(type="nms")), "test_cfg.nms must have iou_threshold"),
        (dict(), dict(nms=dict(iou_threshold=0.5, max_num=3)), r"split_thr, got .*'max_num': 3"),
        (dict(), dict(nms_pre=-1), "test_cfg.nms_pre must be positive for post-processing, got -1"),
        (dict(), dict(max_per_img=None), "test_cfg.max_per_img must be positive .* got None"),
    ],
    ids=str,
)
def test_heads_and_options_that_are_refused(head, test_cfg, message):
    model = build("other", test_cfg, **head)
    with pytest.raises(ValueError, match=message):
        exportable(model, postprocess=True)
    exportable(model)


def test_models_that_are_refused(root):
    config = Config.fromfile(root / "configs/demo/mask-rcnn_softpp-mini_fpn_shapes.py")
    message = "post-processing is exported of detectors with one stage .*, which MaskRCNN is not"
    with pytest.raises(ValueError, match=message):
        exportable(build_model(config).eval(), postprocess=True)
    with pytest.raises(ValueError, match="part='backbone' has no post-processing"):
        exportable(build(), "backbone", postprocess=True)


@pytest.mark.parametrize("library", ["mmseg", "mmpretrain"])
def test_models_of_other_libraries(library):
    import_library(library)
    model = build_model(ConfigDict(default_scope=library, model=LIBRARIES[library]())).eval()
    with pytest.raises(ValueError, match="post-processing is exported of detectors with one stage"):
        exportable(model, postprocess=True)


def test_no_program_of_torch(tmp_path):
    module = exportable(build(), postprocess=True)
    message = "as a torch.export program: its non-maximum suppression is an operator of ONNX"
    with pytest.raises(ValueError, match=message):
        export_program(module, Input(SIZE), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
