"""ONNX files of the smallest models, run by onnxruntime."""

import pytest
import torch
from mini_models import DENSE_HEADS, LIBRARIES, import_library
from mmengine.config import Config, ConfigDict
from operators import needs_torch_2_6
from released import SMALL

from mmsoft.analysis import attention_blocks, load_model
from mmsoft.builder import build_model
from mmsoft.export import Input, export_onnx, exportable
from mmsoft.export.onnx import start
from mmsoft.export.program import Difference, compare, refuse
from mmsoft.models import SOFT, SOFTPlusPlus

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmsoft.export import functions  # noqa: E402  (needs onnxscript)

pytestmark = needs_torch_2_6

DYNAMIC = dict(dynamic_batch=True, dynamic_size=True)
FIRST = dict(out_indices=(0,))  # a stage, which is exported in a third of the time of four
long = pytest.mark.long


class Model(torch.nn.Module):
    """A backbone where OpenMMLab's models have it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def build(library, **backbone):
    """The smallest model of a library, with one block a stage."""
    import_library(library)
    model = LIBRARIES[library](**backbone)
    model["backbone"]["arch"] = SMALL
    config = ConfigDict(default_scope=library, model=model)
    torch.manual_seed(0)
    return build_model(config).eval()


def check(module, inputs, path, tolerance=2e-5):
    """Export, and read the file as another program would."""
    differences = export_onnx(module, inputs, path)
    assert {difference.name for difference in differences} == set(module.names)
    # 4e-6 measured by content
    assert max(difference.error for difference in differences) < tolerance
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert [(opset.domain, opset.version) for opset in file.opset_import if not opset.domain] == [
        ("", 18)
    ]
    assert [value.name for value in file.graph.input] == ["images"]
    assert [value.name for value in file.graph.output] == list(module.names)
    assert {node.domain for node in file.graph.node} == {""}
    return file, differences


def far(path, module, sizes):
    """The largest difference between a file and its module at some sizes, which none else chose."""
    session, found = start(path), []
    for size in sizes:
        images = Input().images(1, size)
        with torch.no_grad():
            expected = module(images)
        outputs = session.run(None, {"images": images.numpy()})
        found += compare(module.names, images, expected, outputs)
    return max(difference.error for difference in found)


def test_backbone_of_one_size(tmp_path):
    module = exportable(Model(SOFT(SMALL, newton_steps=7)).eval(), "backbone")
    size = (97, 161)  # no stage has a whole number of patches
    file, differences = check(module, Input(size), tmp_path / "soft.onnx")
    kernels = [node for node in file.graph.node if node.op_type == "Exp"]
    assert len(kernels) == 3 * 2  # in each layer of landmarks with themselves and with tokens
    made = {name: node.op_type for node in file.graph.node for name in node.output}
    normalized = [n.input[0] for n in file.graph.node if n.op_type == "LayerNormalization"]
    assert {made.get(name) for name in normalized} >= {"Sum"}
    assert "Add" not in {made.get(name) for name in normalized}  # onnxruntime's fusion is slow
    assert {d.images for d in differences} == {(1, 3, *size)}
    assert [d.name for d in differences] == ["stage1", "stage2", "stage3", "stage4"] * 2
    assert [d.padded for d in differences] == [False] * 4 + [True] * 4


def test_backbone_of_one_size_with_what_it_has_by_default(tmp_path):
    """Landmarks by content, 49 of 72 candidates."""
    module = exportable(Model(SOFTPlusPlus(SMALL, out_indices=(0,))).eval(), "backbone")
    file, _ = check(module, Input((256, 288)), tmp_path / "content.onnx")
    (loop,) = [node for node in file.graph.node if node.op_type == "Loop"]  # a layer
    assert len(loop.attribute[0].g.node) < 20  # the Gram matrix of so few is stored


def test_backbone_of_any_size_by_content(tmp_path):
    """The choice of landmarks is a loop; 9 of them, fewer and more than there are patches."""
    options = dict(landmarks="content", max_landmarks=9, out_indices=(0,))
    backbone = SOFTPlusPlus(SMALL, **options)
    module = exportable(Model(backbone).eval(), "backbone")
    inputs = Input((128, 160), batch=2, **DYNAMIC)
    _, differences = check(module, inputs, tmp_path / "content.onnx", 1e-4)
    batches, sizes = zip(*((d.images[0], d.images[2:]) for d in differences))
    assert set(batches) == {2, 3}
    assert len(set(sizes)) == 3


def test_weights_that_bring_batch_norm(tmp_path):
    """As released ones: the norms have been changed in place, and are no operators of the file."""
    torch.manual_seed(0)
    source = SOFT(SMALL, out_indices=(0,), newton_steps=7, norm_cfg=dict(type="BN")).train()
    source(1 + torch.randn(2, 3, 64, 64))  # statistics
    backbone = SOFT(SMALL, out_indices=(0,), newton_steps=7)
    backbone.load_state_dict(source.state_dict())
    module = exportable(Model(backbone).eval(), "backbone")
    file, _ = check(module, Input((64, 97)), tmp_path / "released.onnx")
    kinds = {node.op_type for node in file.graph.node}
    assert not kinds & {"BatchNormalization", "GroupNormalization", "InstanceNormalization"}


@pytest.mark.parametrize(
    ("backbone", "last"),
    [
        (SOFTPlusPlus, 0),
        pytest.param(SOFTPlusPlus, 2, marks=long),
        pytest.param(SOFT, 2, marks=long),
    ],
)
def test_direct_solver(tmp_path, monkeypatch, backbone, last):
    """Of released landmarks, which alone have an inverse: products of matrices, and no loop."""
    solved, solve = [], functions.tikhonov_solve
    monkeypatch.setattr(
        functions, "tikhonov_solve", lambda *args: solved.append(args) or solve(*args)
    )
    options = dict(landmarks="released", solver="direct", out_indices=(last,))
    model = Model(backbone(SMALL, **options)).eval()
    inputs = Input((160, 192))  # 30 landmarks
    file, _ = check(exportable(model, "backbone"), inputs, tmp_path / "direct.onnx", 1e-4)
    assert len(solved) == last + 1  # in each layer
    assert "Loop" not in {node.op_type for node in file.graph.node}


RELEASED_SIZES = [(64, 64), (97, 256), (320, 303)]  # 4, 24 and 90 patches


EVERY_STAGE = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("solver", "budget", "stages"),
    [
        ("direct", None, (0,)),
        pytest.param("direct", None, EVERY_STAGE, marks=long),
        pytest.param("direct", 9, EVERY_STAGE, marks=long),
        pytest.param("newton", None, EVERY_STAGE, marks=long),
        pytest.param("newton", 9, EVERY_STAGE, marks=long),
    ],
)
def test_released_landmarks_of_any_size(tmp_path, solver, budget, stages):
    """As many as an image has patches, or at most a budget; the file has the solver asked for."""
    options = dict(landmarks="released", max_landmarks=budget, out_indices=stages)
    model = Model(SOFTPlusPlus(SMALL, solver=solver, **options)).eval()
    module = exportable(model, "backbone")
    path = tmp_path / "released.onnx"
    check(module, Input((128, 160), dynamic_size=True), path)
    assert far(path, module, RELEASED_SIZES) < 2e-5  # 4e-6 measured
    layers = attention_blocks(model).values()
    for name, other in (
        ("solver", {"newton": "direct", "direct": "newton"}[solver]),
        ("max_landmarks", {None: 9, 9: None}[budget]),
    ):
        before = [getattr(layer, name) for layer in layers]
        for layer in layers:
            setattr(layer, name, other)
        assert far(path, module, RELEASED_SIZES) > 5e-5  # 1e-4 and more measured
        for layer, value in zip(layers, before):
            setattr(layer, name, value)


@long
@pytest.mark.parametrize("options", [dict(), dict(max_landmarks=16, max_keys=64)], ids=str)
def test_backbones_of_any_size(tmp_path, options):
    module = exportable(Model(SOFTPlusPlus(SMALL, **options)).eval(), "backbone")
    check(module, Input((128, 160), **DYNAMIC), tmp_path / "any.onnx", 1e-4)


def test_classifier(tmp_path):
    module = exportable(build("mmpretrain"))
    _, (difference, _) = check(module, Input((64, 64)), tmp_path / "classifier.onnx")
    assert difference.shape == (1, 3)


def test_segmentor_gives_logits_at_the_size_of_the_image(tmp_path):
    model = build("mmseg", max_landmarks=9, **FIRST)
    module = exportable(model)
    _, (difference, _) = check(module, Input((64, 96)), tmp_path / "segmentor.onnx")
    assert difference.shape == (1, 2, 64, 96)
    images = torch.randn(1, 3, 64, 96)
    meta = [dict(ori_shape=(64, 96), img_shape=(64, 96))]
    with torch.no_grad():
        (ours,), expected = module(images), model.inference(images, meta)
    torch.testing.assert_close(ours, expected)


def test_detector_gives_what_its_dense_head_says(tmp_path):
    model = build("mmdet", **FIRST)
    module = exportable(model)
    _, differences = check(module, Input((64, 96)), tmp_path / "detector.onnx")
    assert [d.name for d in differences][::5] == ["cls_scores_0", "bbox_preds_0"] * 2
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        scores, boxes = model(images, mode="tensor")
        for ours, expected in zip(module(images), (*scores, *boxes), strict=True):
            torch.testing.assert_close(ours, expected)


THIRD = dict(FCOSHead="centernesses", ATSSHead="centernesses", YOLOXHead="objectnesses")


def with_head(**head):
    """The smallest detector with another dense head."""
    import_library("mmdet")
    model = LIBRARIES["mmdet"]()
    model["type"] = "mmdet.SingleStageDetector"
    model["backbone"]["arch"] = SMALL
    model["bbox_head"] = dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1)
    model["bbox_head"].update(head)
    torch.manual_seed(0)
    return build_model(ConfigDict(default_scope="mmdet", model=model)).eval()


@pytest.mark.parametrize("head", DENSE_HEADS)
def test_every_output_of_a_dense_head_has_a_name(head):
    """Of what a head says beside classes and boxes too."""
    model = with_head(**DENSE_HEADS[head])
    module = exportable(model)
    names = ["cls_scores", "bbox_preds", THIRD[head]]
    assert list(module.names) == [f"{name}_{level}" for name in names for level in range(5)]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, expected = module(images), model(images, mode="tensor")
    expected = [level for levels in expected for level in levels]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


@long
def test_detector_with_a_third_output(tmp_path):
    module = exportable(with_head(**DENSE_HEADS["FCOSHead"]))
    _, differences = check(module, Input((64, 96)), tmp_path / "fcos.onnx")
    assert [d.name for d in differences][10:15] == [f"centernesses_{i}" for i in range(5)]


class Pool(torch.nn.Module):
    """Adaptive pooling to a number, as of UperNet, and to at most a number, as of `max_keys`."""

    names, coarsest = ("fixed", "limited"), 32

    def forward(self, images):
        most = [torch.sym_min(side, 128) for side in images.shape[2:]]
        pool = torch.nn.functional.adaptive_avg_pool2d
        return pool(images, 6), pool(images, most)


def test_pooling_of_any_size(tmp_path):
    _, differences = check(Pool().eval(), Input((96, 160), **DYNAMIC), tmp_path / "pool.onnx")
    assert {d.shape[2:] for d in differences if d.name == "limited"} == {
        (96, 128),
        (64, 128),
        (125, 101),
    }


@long
@pytest.mark.parametrize("library", ["mmdet", "mmseg", "mmpretrain"])
def test_models_of_any_size(tmp_path, library):
    module = exportable(build(library, max_landmarks=9))
    check(module, Input((192, 160), **DYNAMIC), tmp_path / "any.onnx")


# 2 to 4e-6 measured.
ODD = [(200, 333), (97, 161)]
EVERY_MODEL = [
    ("mmdet", "backbone", dict(landmarks="released", max_landmarks=9)),
    ("mmdet", "model", dict()),
    ("mmseg", "model", dict(landmarks="released", max_landmarks=None, solver="direct")),
]


@long
@pytest.mark.parametrize("size", ODD, ids=str)
@pytest.mark.parametrize(("library", "part", "options"), EVERY_MODEL)
def test_one_size_that_is_no_multiple_of_32(tmp_path, library, part, options, size):
    module = exportable(build(library, **options), part)
    _, differences = check(module, Input(size), tmp_path / "odd.onnx")
    assert {d.images for d in differences} == {(1, 3, *size)}


@long
def test_stage_of_any_size_that_is_no_multiple_of_32(tmp_path):
    options = dict(landmarks="released", max_landmarks=9, out_indices=(0,))
    module = exportable(Model(SOFTPlusPlus(SMALL, **options)).eval(), "backbone")
    check(module, Input((64, 90), dynamic_size=True), tmp_path / "odd.onnx")
    assert far(tmp_path / "odd.onnx", module, [*ODD, (128, 160)]) < 2e-5


@long
@pytest.mark.parametrize(("library", "part", "options"), EVERY_MODEL)
def test_any_size_that_is_no_multiple_of_32(tmp_path, library, part, options):
    module = exportable(build(library, **options), part)
    check(module, Input((192, 160), dynamic_size=True), tmp_path / "odd.onnx")
    assert far(tmp_path / "odd.onnx", module, [*ODD, (223, 352), (256, 353)]) < 2e-5


def test_two_stage_detector_gives_features_and_proposals(root):
    config = Config.fromfile(root / "configs/demo/mask-rcnn_softpp-mini_fpn_shapes.py")
    module = exportable(load_model(config))
    assert module.names[::3] == ["features_0", "cls_scores_0", "bbox_preds_0"]
    with torch.no_grad():
        outputs = module(torch.randn(1, 3, 64, 64))
    assert len(outputs) == len(module.names)


@long
def test_two_stage_detector(root, tmp_path):
    """The demo's Mask R-CNN, a whole model of a config."""
    config = Config.fromfile(root / "configs/demo/mask-rcnn_softpp-mini_fpn_shapes.py")
    torch.manual_seed(0)
    module = exportable(load_model(config))
    _, differences = check(module, Input((64, 96)), tmp_path / "mask-rcnn.onnx")
    assert [d.name for d in differences] == list(module.names) * 2


# ------------------------------------------------------------------------------------- refusals


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    """Newton-Raphson of another number of steps."""
    newton = functions.newton_raphson_pinv
    monkeypatch.setattr(functions, "newton_raphson_pinv", lambda *args: newton(*args[:3], 3))
    path = tmp_path / "wrong.onnx"
    path.write_text("an earlier file")
    module = exportable(
        Model(SOFT(SMALL, out_indices=(0,), norm_cfg=dict(type="BN"))).eval(), "backbone"
    )
    with pytest.raises(
        ValueError, match=r"stage1 differs from the model's by .* nothing was written"
    ):
        export_onnx(module, Input((64, 64)), path)
    assert path.read_text() == "an earlier file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["wrong.onnx"]


@pytest.mark.parametrize("where", ["program", "model", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_is_a_difference(value, where):
    images, good = torch.zeros(1, 3, 32, 32), torch.ones(2, 3)
    bad = good.clone()
    bad[0, 1] = value
    expected = (good, good if where == "program" else bad)
    found = [good.numpy(), (good if where == "model" else bad).numpy()]
    first, second = compare(["a", "b"], images, expected, found)
    assert (first.error, second.error) == (0, float("inf"))
    with pytest.raises(ValueError, match="b differs from the model's by inf"):
        refuse([first, second], 1e-4)


def test_a_small_difference_is_refused_too():
    with pytest.raises(ValueError, match="differs"):
        refuse([Difference((1,), "a", (1,), 0), Difference((1,), "b", (1,), 2e-4)], 1e-4)


def test_invalid_inputs():
    with pytest.raises(ValueError, match="at least 32 pixels a side"):
        Input((31, 64))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        Input(batch=0)
    with pytest.raises(ValueError, match="part must be one of"):
        exportable(Model(SOFT(SMALL)).eval(), "neck")
    with pytest.raises(ValueError, match="evaluation mode"):
        exportable(Model(SOFT(SMALL)).train(), "backbone")
    with pytest.raises(ValueError, match="no classifier"):
        exportable(Model(SOFT(SMALL)).eval())


def test_a_head_whose_outputs_are_others():
    """As that of VarifocalNet, which returns two of the three that its loss takes."""
    model = with_head(**DENSE_HEADS["FCOSHead"])
    forward = model.bbox_head.forward
    message = "FCOSHead returns other outputs than cls_scores, bbox_preds, centernesses of 5 levels"
    for other in (lambda x: forward(x)[:2], lambda x: (*forward(x)[:2], x[0])):
        model.bbox_head.forward = other
        with pytest.raises(ValueError, match=message):
            exportable(model)


def test_segmentors_whose_heads_need_more_than_features():
    import_library("mmseg")
    model = LIBRARIES["mmseg"]()
    model["backbone"]["arch"] = SMALL
    second = dict(model["decode_head"], type="mmseg.OCRHead", ocr_channels=16)
    del second["num_convs"]
    cascade = dict(type="mmseg.CascadeEncoderDecoder", num_stages=2)
    cascade["decode_head"] = [model["decode_head"], second]
    model = build_model(ConfigDict(default_scope="mmseg", model=dict(model, **cascade))).eval()
    with pytest.raises(ValueError, match="CascadeEncoderDecoder has several decode heads"):
        exportable(model)
    model.decode_head = model.decode_head[1]
    with pytest.raises(ValueError, match="OCRHead takes 2 arguments, not features alone"):
        exportable(model)


def test_segmentors_whose_heads_return_more_than_logits():
    """As that of EncNet, with its second loss."""
    import_library("mmseg")
    model = LIBRARIES["mmseg"]()
    model["backbone"]["arch"] = SMALL
    head = dict(type="mmseg.EncHead", in_channels=[96, 128], in_index=[2, 3], num_codes=4)
    head.update(channels=16, num_classes=2, use_se_loss=True)
    model = build_model(ConfigDict(default_scope="mmseg", model=dict(model, decode_head=head)))
    model.eval()
    with pytest.raises(ValueError, match="EncHead returns other things beside logits; export its"):
        exportable(model)
    assert exportable(model, "backbone").names == ["stage1", "stage2", "stage3", "stage4"]
    model.decode_head.use_se_loss = False
    assert exportable(model).names == ("logits",)


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_models_of_sequences(root, part):
    import_library("mmpretrain")
    model = build_model(Config.fromfile(root / "configs/lra/softpp_text.py")).eval()
    with pytest.raises(ValueError, match="SequenceSOFTPlusPlus takes sequences; only models of"):
        exportable(model, part)


def test_a_backbone_that_does_not_say_what_it_returns():
    message = "Identity does not say by out_indices which features it returns"
    with pytest.raises(ValueError, match=message):
        exportable(Model(torch.nn.Identity()).eval(), "backbone")


class Branch(torch.nn.Module):
    """A module that no exporter takes, or that ONNX does not."""

    names, coarsest = ("out",), 32

    def __init__(self, recorded):
        super().__init__()
        self.recorded = recorded

    def forward(self, images):
        if self.recorded or float(images.sum()) > 0:
            return (torch.linalg.cholesky(torch.eye(3) + 0 * images.mean()),)
        return (images,)


@pytest.mark.parametrize("recorded", [False, True])
def test_errors_of_the_exporters_are_one_that_names_the_model(tmp_path, recorded):
    with pytest.raises(ValueError, match=r"^Branch cannot be exported: \w+: [^\n]+$"):
        export_onnx(Branch(recorded).eval(), Input((64, 64)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((63, 224), dict(), "from 64 to 4096 pixels a side"),
        ((224, 4097), dict(), "to 4096 pixels a side"),
    ],
)
def test_no_program_of_any_size(tmp_path, shape, options, message):
    module = exportable(Model(SOFTPlusPlus(SMALL, **options)).eval(), "backbone")
    with pytest.raises(ValueError, match=message):
        export_onnx(module, Input(shape, dynamic_size=True), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    from mmsoft import builder

    found = builder.find_spec
    monkeypatch.setattr(
        builder, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    module = exportable(Model(SOFT(SMALL)).eval(), "backbone")
    with pytest.raises(ImportError, match=r"onnxscript is missing: pip install 'mmsoft\[deploy\]'"):
        export_onnx(module, Input(), tmp_path / "model.onnx")
