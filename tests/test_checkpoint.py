"""Released checkpoints and our own, into backbones and whole models."""

import argparse
import itertools
import logging
import os
import re
from functools import partial

import pytest
import torch
from metrics import error, same
from mini_models import LIBRARIES, build, import_library
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint, save_checkpoint
from released import ARCH, images, outputs, state_dict

import mmsoft.checkpoint.loader  # noqa: F401  (for what goes through MMEngine)
from mmsoft.checkpoint import convert_released, infer_arch, is_released, read_checkpoint
from mmsoft.models import SOFT, SOFTPlusPlus

RECORDED = {"soft": ("SOFT", "soft_tiny"), "softpp": ("SOFTPlusPlus", "soft_norm_tiny")}


def released_file(path, model="soft_norm_tiny", weights=None, **changes):
    """What timm's saver writes; the golden weights are the EMA ones."""
    content = dict(
        epoch=299,
        arch=model,
        state_dict=state_dict(seed=1),
        optimizer=dict(state={0: dict(step=10)}, param_groups=[dict(lr=1e-3, params=[0])]),
        version=2,
        args=argparse.Namespace(model=model, lr=1e-3, mean=(0.5, 0.5), opt_betas=None),
        state_dict_ema=weights or state_dict(),
        metric=79.4,
    )
    content.update(changes)
    torch.save({k: v for k, v in content.items() if v is not None}, path)
    return str(path)


def pretrained(path, **kwargs):
    return dict(type="Pretrained", checkpoint=str(path), **kwargs)


def loaded(path, variant=SOFTPlusPlus, arch=ARCH, prefix=None, **options):
    """A backbone that has loaded a checkpoint."""
    backbone = variant(arch, init_cfg=pretrained(path, prefix=prefix), **options)
    backbone.init_weights()
    return backbone


@pytest.fixture
def released(tmp_path):
    return released_file(tmp_path / "SOFT_Tiny_norm.pth")


_numbers = itertools.count()


@pytest.fixture
def log(caplog):
    """What MMEngine logs, which pytest does not capture by default."""
    from mmengine.logging import MMLogger

    # A new one, because MMEngine logs to the most recently created one.
    logger = MMLogger.get_instance(f"test-checkpoint-{next(_numbers)}")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def lines(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.INFO]


# Released files


@pytest.mark.parametrize("variant", RECORDED)
def test_backbone_from_an_untouched_released_file(variant, tmp_path, log):
    name, model = RECORDED[variant]
    file = released_file(tmp_path / "SOFT_Tiny.pth", model)
    backbone = MODELS.build(dict(type=f"mmsoft.{name}", arch=ARCH, init_cfg=pretrained(file)))
    backbone.init_weights()
    with torch.no_grad():
        stages = backbone.eval()(images(224, 224))
    for i, stage in enumerate(stages):
        expected = outputs(variant, "wellcond", (224, 224))[f"stage{i + 1}"]
        assert error(stage[:, ::5, ::3, ::3], expected) < 1e-4
    (line,) = [line for line in lines(log) if "tensors of the backbone" in line]
    assert "state_dict_ema" in line
    assert "loaded all" in line
    assert line.endswith("; left out 2 of the checkpoint (2 of head)")
    log.clear()
    backbone.train()
    assert lines(log) == []  # it was said


@pytest.mark.parametrize("where", ["init_cfg", "load_from"])
@pytest.mark.parametrize("variant", RECORDED)
def test_classifier_reproduces_the_recorded_logits(variant, where, tmp_path):
    """The whole model takes the untouched file, head and all."""
    import_library("mmpretrain")
    init_default_scope("mmpretrain")
    name, model = RECORDED[variant]
    file = released_file(tmp_path / "SOFT_Tiny.pth", model)
    classifier = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type=f"mmsoft.{name}", arch=ARCH, out_indices=(3,), out_type="cls_token"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=10, in_channels=128),
            init_cfg=pretrained(file) if where == "init_cfg" else None,
        )
    )
    if where == "init_cfg":
        classifier.init_weights()
    else:
        load_checkpoint(classifier, file, map_location="cpu", strict=True)
    with torch.no_grad():
        for size in [(224, 224), (160, 256)]:
            logits = classifier.eval()(images(*size), mode="tensor")
            assert error(logits, outputs(variant, "wellcond", size)["logits"]) < 1e-4


@pytest.mark.parametrize("library", LIBRARIES)
def test_backbone_of_a_model_from_a_released_file(library, released):
    model = build(library, init_cfg=pretrained(released))
    model.init_weights()
    assert same(model.backbone.state_dict(), loaded(released).state_dict())
    assert torch.equal(model.backbone.stages[0].pos_embed, state_dict()["pos_embed1"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_own_checkpoints(library, tmp_path):
    """As MMEngine saves them: into the whole model, and into a backbone alone."""
    model = build(library, img_size=(64, 128))
    file = str(tmp_path / "epoch_1.pth")
    save_checkpoint(dict(meta=dict(epoch=1), state_dict=model.state_dict()), file)
    again = build(library, img_size=(64, 128))
    load_checkpoint(again, file, strict=True)
    assert same(again.state_dict(), model.state_dict())
    for prefix in (None, "backbone", "backbone."):
        backbone = loaded(file, prefix=prefix, img_size=(64, 128))
        assert same(backbone.state_dict(), model.backbone.state_dict())


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_bare_released_state_dict(wrapper, tmp_path):
    torch.save({f"{wrapper}{k}": v for k, v in state_dict().items()}, tmp_path / "bare.pth")
    backbone = loaded(tmp_path / "bare.pth", SOFT)
    assert torch.equal(backbone.stages[3].cls_token, state_dict()["cls_token"])


def test_ema_weights_are_preferred(released, tmp_path):
    for file, key, seed in (
        (released, "state_dict_ema", 0),
        (released_file(tmp_path / "plain.pth", state_dict_ema=None), "state_dict", 1),
    ):
        converted = convert_released(read_checkpoint(file))
        assert converted["meta"]["released"]["weights"] == key
        expected = state_dict(seed=seed)["cls_token"]
        assert torch.equal(converted["state_dict"]["backbone.stages.3.cls_token"], expected)


def test_weights_of_stages_not_built_are_counted_in_one_line(released, log):
    backbone = loaded(released, out_indices=(0, 1))
    assert torch.equal(backbone.stages[1].pos_embed, state_dict()["pos_embed2"])
    (line,) = [line for line in lines(log) if "tensors of the backbone" in line]
    dropped = [
        k
        for k in convert_released(read_checkpoint(released))["state_dict"]
        if re.match(r"backbone\.(stages\.[23]|norm)\.", k)
    ]
    left = f"{len(dropped)} of stages not built, 2 of head"
    assert line.endswith(f"left out {len(dropped) + 2} of the checkpoint ({left})")


def test_resized_position_embeddings_are_counted(released, log):
    loaded(released, img_size=(96, 160))
    (line,) = [line for line in lines(log) if "tensors of the backbone" in line]
    assert ", 4 of them resized; left out" in line


@pytest.mark.parametrize(
    ("start", "mode"),
    [("load_checkpoint", "train"), ("load_checkpoint", "eval"), ("torch", "eval")],
)
def test_one_line_says_that_the_heads_are_untrained(start, mode, released, tmp_path, log):
    """A classifier's file into a whole detector: MMEngine goes on, with a list of names."""
    from mmengine.logging import MMLogger

    detector = build("mmdet", img_size=(96, 160))
    if start == "torch":
        weights = convert_released(read_checkpoint(released))["state_dict"]
        detector.load_state_dict(weights, strict=False)
    else:
        load_checkpoint(detector, released)
    assert not [line for line in lines(log) if "tensors of the backbone" in line]
    MMLogger.get_instance(f"{tmp_path.name}-{mode}", log_file=str(tmp_path / "log"))
    MMLogger.get_current_instance().addHandler(log.handler)
    getattr(detector, mode)()
    getattr(detector, mode)()
    names = [name for name, _ in detector.named_parameters() if "backbone." not in name]
    of = {part: sum(name.startswith(part) for name in names) for part in ("neck", "bbox_head")}
    assert min(of.values()) > 1
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    line = record.getMessage()
    assert record.levelno == logging.WARNING
    backbone = len(detector.backbone.state_dict())
    assert line == (
        f"SOFTPlusPlus: loaded all {backbone} tensors of the backbone, 4 of them resized; left out "
        f"2 of the checkpoint (2 of head); {len(names)} tensors of the model are not in it, or "
        f"have another size, and are untrained ({of['neck']} of neck, {of['bbox_head']} of "
        "bbox_head)"
    )
    text = (tmp_path / "log").read_text()
    assert f"\nuntrained: {', '.join(names)}\n" in text
    assert "\nleft out: head.fc." in text
    assert "\nresized: backbone.stages.0.pos_embed, backbone.stages.1.pos_embed" in text


def test_a_head_of_another_size_is_untrained_and_a_whole_checkpoint_needs_no_warning(tmp_path, log):
    model = build("mmpretrain")
    weights = model.state_dict()
    torch.save(weights, tmp_path / "whole.pth")
    load_checkpoint(model, str(tmp_path / "whole.pth"))
    model.eval()
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    assert record.levelno == logging.INFO
    assert "untrained" not in record.getMessage()
    assert "left out" not in record.getMessage()
    log.clear()
    for name in weights:
        if name.startswith("head"):
            weights[name] = weights[name][:1]
    torch.save(weights, tmp_path / "narrow.pth")
    load_checkpoint(model, str(tmp_path / "narrow.pth"))
    model.eval()
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    assert record.getMessage().endswith("; 2 tensors of the model are not in it, or have another "
                                        "size, and are untrained (2 of head)")  # fmt: skip


def test_a_tensor_of_another_size_is_untrained_and_neither_loaded_nor_resized(released, log):
    model = build("mmpretrain", in_channels=4)
    load_checkpoint(model, released)
    model.eval()
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    size = len(model.backbone.state_dict())
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"SOFTPlusPlus: loaded {size - 1} of {size} tensors of the backbone; 3 tensors of the "
        "model are not in it, or have another size, and are untrained (1 of backbone, 2 of head)"
    )


def test_what_the_backbone_lacks_is_counted(tmp_path, log):
    model = build("mmpretrain")
    weights = model.state_dict()
    lost = [name for name in weights if name.startswith("backbone.stages.3.blocks.0.mlp")]
    assert len(lost) > 1
    torch.save({k: v for k, v in weights.items() if k not in lost}, tmp_path / "part.pth")
    load_checkpoint(model, str(tmp_path / "part.pth"))
    model.eval()
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    size = len(model.backbone.state_dict())
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"SOFTPlusPlus: loaded {size - len(lost)} of {size} tensors of the backbone ({len(lost)} "
        "are not in it, and untrained)"
    )


@pytest.mark.parametrize("load", ["mmengine", "torch"])
@pytest.mark.parametrize("kind", ["bare", "another backbone", "heads"])
def test_weights_of_which_the_backbone_takes_none(kind, load, tmp_path, log):
    model = build("mmpretrain")
    size = len(model.backbone.state_dict())
    weights = {
        "bare": model.backbone.state_dict(),
        "another backbone": {"layer1.0.conv1.weight": torch.zeros(1)},
        "heads": {k: v for k, v in model.state_dict().items() if k.startswith("head.")},
    }[kind]
    if load == "torch":
        model.load_state_dict(weights, strict=False)
    else:
        torch.save(weights, tmp_path / "weights.pth")
        load_checkpoint(model, str(tmp_path / "weights.pth"))
    model.eval()
    (record,) = [r for r in log.records if "tensors of the backbone" in r.getMessage()]
    assert record.levelno == logging.WARNING
    line = record.getMessage()
    assert line.startswith(f"SOFTPlusPlus: loaded none of the {size} tensors of the backbone, un")
    assert (f"; {size} have their names without 'backbone.': a file of" in line) == (kind == "bare")
    assert ("2 tensors of the model are not in it" in line) == (kind != "heads")


@pytest.mark.parametrize("others", [None, [dict(type="Constant", layer="Linear", val=3.0)]])
@pytest.mark.parametrize("library", ["", *LIBRARIES])
def test_mmengine_logs_where_each_parameter_came_from(library, others, tmp_path):
    from mmengine.logging import MMLogger

    weights = SOFTPlusPlus(ARCH).state_dict()  # zero biases too: the same before and after
    torch.save(weights, tmp_path / "own.pth")
    init_cfg = pretrained(tmp_path / "own.pth")
    init_cfg = [init_cfg, *others] if others else init_cfg
    if library:
        model = build(library, init_cfg=init_cfg)
        prefix = "backbone."
    else:
        model, prefix = SOFTPlusPlus(ARCH, init_cfg=init_cfg), ""
    MMLogger.get_instance(tmp_path.name, log_file=str(tmp_path / "log"))
    model.init_weights()
    entries = re.findall(r"\n(\S+) - torch.Size.*: \n(.*)", (tmp_path / "log").read_text())
    origins = {name: origin for name, origin in entries if name.startswith(prefix)}
    backbone = model.backbone if library else model
    assert origins.keys() == {f"{prefix}{name}" for name, _ in backbone.named_parameters()}
    assert {origin.strip() for origin in origins.values()} == {
        f"loaded from {tmp_path / 'own.pth'}"
    }
    assert not any(hasattr(module, "_params_init_info") for module in model.modules())
    assert backbone.init_cfg == init_cfg
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("library", LIBRARIES)
def test_mmengine_does_not_call_loaded_parameters_unchanged(library, tmp_path):
    """A whole model's ``init_cfg``: MMEngine compares means, and zero biases keep theirs."""
    from mmengine.logging import MMLogger

    weights = build(library).state_dict()
    left_out = next(name for name in reversed(weights) if name.endswith("bias"))
    del weights[left_out]
    torch.save(weights, tmp_path / "own.pth")
    model = build(library)
    model.init_cfg = pretrained(tmp_path / "own.pth")
    MMLogger.get_instance(tmp_path.name, log_file=str(tmp_path / "log"))
    model.init_weights()
    entries = re.findall(r"\n(\S+) - torch.Size.*: \n(.*)", (tmp_path / "log").read_text())
    assert {name for name, _ in entries} == {name for name, _ in model.named_parameters()}
    origins = {origin.strip() for name, origin in entries if name in weights}
    assert origins == {f"PretrainedInit: load from {tmp_path}/own.pth"}
    (other,) = (origin for name, origin in entries if name not in weights)
    assert "load from" not in other


# What does not fit


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (dict(ARCH, depths=[1, 2, 3, 2]), r"depths \[1, 2, 2, 2\].*config.*\[1, 2, 3, 2\]"),
        (dict(ARCH, embed_dims=[32, 64, 128, 128], num_heads=[1, 2, 4, 4]),
         r"embed_dims \[32, 64, 96, 128\].*config.*\[32, 64, 128, 128\].*num_heads"),
        (dict(ARCH, num_heads=[1, 2, 6, 4]), r"num_heads \[1, 2, 3, 4\].*config.*\[1, 2, 6, 4\]"),
        (dict(ARCH, landmark_strides=[8, 4, 4]), r"landmark_strides \[8, 4, 2\].*\[8, 4, 4\]"),
        (dict(ARCH, value_kernels=[7, 5, 3]), r"value_kernels \[9, 5, 3\].*config.*\[7, 5, 3\]"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused(arch, message, released):
    with pytest.raises(ValueError, match=message) as caught:
        loaded(released, arch=arch)
    assert "SOFT_Tiny_norm.pth" in str(caught.value)


def test_another_architecture_is_refused_by_load_from(released):
    """MMEngine loads non-strictly and would only log it."""
    model = torch.nn.Module()
    model.backbone = SOFTPlusPlus(dict(ARCH, depths=[1, 2, 4, 2]))
    with pytest.raises(ValueError, match=r"depths \[1, 2, 2, 2\].*config.*\[1, 2, 4, 2\]"):
        load_checkpoint(model, released)


def test_another_backbone_is_refused_by_load_from(tmp_path):
    """Swin's names begin like ours; that some fit must not hide that most do not."""
    others = ["stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.attn.w_msa.qkv.weight"]
    file = tmp_path / "swin.pth"
    torch.save({"state_dict": {f"backbone.{name}": torch.zeros(32) for name in others}}, file)
    model = torch.nn.Module()
    model.backbone = SOFTPlusPlus(ARCH)
    message = r"no SOFT\+\+ backbone but keys such as backbone\.stages\.0\.blocks\.0\.attn\.w_msa"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, str(file))
    # A part of our own weights, or none, loads: MMEngine loads non-strictly.
    own = model.state_dict()
    part = {name: own[name] for name in own if name.startswith("backbone.stages.3.blocks")}
    model.load_state_dict(part, strict=False)
    model.load_state_dict({"head.weight": torch.zeros(1)}, strict=False)


def test_another_variant_is_refused(released, tmp_path):
    with pytest.raises(ValueError, match=r"of SOFT\+\+ but the config has SOFT; change the type"):
        loaded(released, SOFT)
    torch.save(SOFT(ARCH).state_dict(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"checkpoint is of SOFT but the config has SOFT\+\+"):
        loaded(tmp_path / "own.pth")
    loaded(released_file(tmp_path / "unnamed.pth", arch="", args=None), SOFT)


RELEASED, CONTENT = dict(landmarks="released"), dict(landmarks="content")


@pytest.mark.parametrize(
    ("saved", "built", "message"),
    [
        (
            dict(RELEASED, solver="direct"),
            RELEASED,
            "saved with solver='direct', the config has solver='newton', another filter of the "
            "landmarks' inverse: write solver='direct' in the config's backbone for theirs",
        ),
        (
            dict(RELEASED, newton_steps=9),
            dict(CONTENT, solver="direct"),  # until the weights are loaded
            "saved with solver='newton', newton_steps=9, the config has solver='direct'",
        ),
        (
            dict(RELEASED, newton_steps=9),
            {},
            "saved with newton_steps=9, the config has newton_steps=20",
        ),
        (
            dict(RELEASED, solver="direct", newton_steps=9),
            dict(RELEASED, solver="direct"),
            None,
        ),
        (dict(RELEASED, solver="newton"), RELEASED, None),
        (dict(CONTENT, solver="direct"), CONTENT, None),
    ],
)
def test_another_inverse_is_told_once(saved, built, message, tmp_path, log):
    source = SOFTPlusPlus(ARCH, **saved)
    assert ("solver" in source.notes()) == (saved["landmarks"] == "released")
    torch.save(source.state_dict(), tmp_path / "own.pth")
    model = loaded(tmp_path / "own.pth", **built)
    warnings = [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]
    layer = model.stages[0].blocks[0].attn
    assert layer.solver == built.get("solver", "newton")  # the config decides
    assert layer.newton_steps == 20


@pytest.mark.parametrize("noted", [{}, dict(solver=3), dict(solver=["direct"]), dict(solver="qr")])
def test_weights_that_do_not_tell_their_inverse_load_silently(noted, tmp_path, log):
    weights = SOFTPlusPlus(ARCH, landmarks="released").state_dict()
    for name in ("solver", "newton_steps"):
        del weights._metadata[""][name]
    weights._metadata[""] |= noted
    torch.save(weights, tmp_path / "own.pth")
    loaded(tmp_path / "own.pth", solver="direct")
    loaded(released_file(tmp_path / "released.pth"), solver="direct")
    assert not [r for r in log.records if r.levelno >= logging.WARNING]


def test_missing_and_unexpected_parameters_are_named(tmp_path):
    weights = state_dict()
    del weights["block2.1.att.norm1.bias"], weights["patch_embed1.proj.1.running_var"]
    weights["block3.0.att.mha.attn.extra.weight"] = torch.zeros(1)
    file = released_file(tmp_path / "changed.pth", weights=weights)
    message = r"changed.pth does not fit.*2 missing.*1 unexpected"
    with pytest.raises(RuntimeError, match=message) as caught:
        loaded(file)
    for name in ("bias", "running_var", "extra"):
        assert name in str(caught.value)
    weights = {**state_dict(), "fc.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown keys: fc.weight"):
        loaded(released_file(tmp_path / "other.pth", weights=weights))


def test_another_shape_is_named(released):
    with pytest.raises(RuntimeError, match=r"SOFT_Tiny_norm.pth.*\n.*patch_embed.0.conv.weight"):
        loaded(released, in_channels=4)


def test_average_landmarks_refuse_convolved_ones(released):
    with pytest.raises(RuntimeError, match=r"5 unexpected: .*landmark_conv.weight"):
        loaded(released, landmark_sampling="avg")


def test_files_without_the_backbone(tmp_path):
    torch.save(dict(state_dict={"layer1.weight": torch.zeros(1)}), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth holds no SOFT backbone; its keys are layer1"):
        loaded(tmp_path / "resnet.pth", SOFT)
    two = {
        f"{who}.backbone.{k}": v
        for who in ("student", "teacher")
        for k, v in SOFT(ARCH).state_dict().items()
    }
    torch.save(dict(state_dict=two), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"student.backbone.*teacher.backbone"):
        loaded(tmp_path / "two.pth", SOFT)
    loaded(tmp_path / "two.pth", SOFT, prefix="teacher.backbone")
    with pytest.raises(ValueError, match=r"prefix given is 'backbone\.'"):
        loaded(tmp_path / "two.pth", SOFT, prefix="backbone")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text.pth is not a checkpoint"):
        read_checkpoint(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.pth")


# Other checkpoints, and the converter


def test_checkpoints_of_other_models_load_unchanged(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(2)), meta=dict(epoch=3)), tmp_path / "x.pth")
    module = torch.nn.Linear(2, 1, bias=False)
    content = load_checkpoint(module, str(tmp_path / "x.pth"))
    assert content["meta"] == dict(epoch=3)
    assert not is_released(content)


def test_infer_arch():
    backbone = SOFT(ARCH, landmark_sampling="avg", out_indices=(2,))
    arch = infer_arch(backbone.state_dict())
    assert arch == dict(
        embed_dims=[32, 64, 96], depths=[1, 2, 2], num_heads=[1, 2, 3], value_kernels=[9, 5, 3]
    )
    assert infer_arch(SOFT("tiny").state_dict()) == SOFT("tiny").arch_settings


@pytest.fixture
def converter(run_tool):
    return partial(run_tool, "model_converters/soft_to_mmsoft.py")


@pytest.mark.parametrize("task", ["classifier", "backbone"])
def test_converted_files_load_like_released_ones(task, converter, released, tmp_path):
    target = tmp_path / "new" / "converted.pth"
    status, printed, _ = converter(released, target, "--task", task)
    assert status == 0
    assert "SOFT++" in printed
    assert "[1, 2, 2, 2]" in printed
    assert os.listdir(target.parent) == ["converted.pth"]
    converted = read_checkpoint(target)["state_dict"]
    assert any(k.startswith("head.fc.") for k in converted) == (task == "classifier")
    for file in (target, released):
        backbone = loaded(file, prefix="backbone.")
        ours = sorted((f"backbone.{k}", v) for k, v in backbone.state_dict().items())
        assert same(ours, sorted(kv for kv in converted.items() if kv[0].startswith("backbone.")))
    with pytest.raises(ValueError, match="checkpoint is of"):  # the variant is kept
        loaded(target, SOFT)


def test_converter_refuses_other_files_and_leaves_nothing(converter, tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(2))), tmp_path / "other.pth")
    for name, message in (
        ("other", "the format of the authors' release"),
        ("none", "No such file"),
    ):
        status, *_ = converter(tmp_path / f"{name}.pth", tmp_path / "out.pth")
        assert message in status
    assert os.listdir(tmp_path) == ["other.pth"]


@pytest.mark.parametrize("task", ["classifier", "backbone"])
@pytest.mark.parametrize(
    ("missing", "added", "message"),
    [
        (["block2.1.att.ff1.bias", "norm.bias"], [], "2 missing: backbone.norm.bias, backbone.st"),
        (["pos_embed1"], [], "1 missing: backbone.stages.0.pos_embed"),
        (["block1."], [], r"18 missing: backbone\.stages\.0\.blocks\.0\."),  # the whole block
        ([], ["norm.extra"], "1 unexpected: backbone.norm.extra"),
        ([], ["head.extra"], "1 unexpected: head.fc.extra"),
        (["pos_embed4"], ["block3.0.extra"],
         "1 missing: backbone.stages.3.pos_embed; 1 unexpected: backbone.stages.2.blocks.0.extra"),
    ],
)  # fmt: skip
def test_converter_names_keys_that_are_missing_or_not_the_releases(
    task, missing, added, message, converter, tmp_path
):
    weights = {k: v for k, v in state_dict().items() if not k.startswith(tuple(missing) or "?")}
    weights.update(dict.fromkeys(added, torch.zeros(1)))
    file = released_file(tmp_path / "changed.pth", weights=weights)
    status, *_ = converter(file, tmp_path / "out.pth", "--task", task)
    assert re.search(f"changed.pth has not the keys of the release; {message}", status)
    assert os.listdir(tmp_path) == ["changed.pth"]


def test_converter_needs_the_head_for_a_classifier_alone(converter, tmp_path):
    weights = {k: v for k, v in state_dict().items() if not k.startswith("head.")}
    file = released_file(tmp_path / "headless.pth", weights=weights)
    status, *_ = converter(file, tmp_path / "out.pth")
    assert status.endswith("2 missing: head.fc.bias, head.fc.weight")
    assert not (tmp_path / "out.pth").exists()
    assert converter(file, tmp_path / "out.pth", "--task", "backbone")[0] == 0


def test_a_failed_conversion_keeps_the_old_file(converter, released, tmp_path, monkeypatch):
    target = tmp_path / "target.pth"
    target.write_text("what was there before")

    def fail(checkpoint, file):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    status, *_ = converter(released, target)
    assert "disk full" in status
    assert target.read_text() == "what was there before"
    assert sorted(os.listdir(tmp_path)) == ["SOFT_Tiny_norm.pth", "target.pth"]
