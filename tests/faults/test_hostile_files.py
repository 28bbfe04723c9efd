"""Checkpoints made to harm, and configs, which are programs."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from fault_runs import config
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from released import ARCH
from torch import nn

from mmsoft.checkpoint import read_checkpoint
from mmsoft.models import SOFTPlusPlus


class Call:
    """Pickled, an instruction to call `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def save(path, weights, **options):
    torch.save(dict(state_dict=weights, meta=dict(epoch=1, iter=1)), path, **options)
    return str(path)


def backbone(**options):
    return SOFTPlusPlus(dict(ARCH, depths=[1, 1, 1, 1]), **options)


@pytest.fixture
def weights():
    return backbone().state_dict()


def load_as_init_cfg(path):
    backbone(init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()


def load_as_load_from(path):
    model = nn.Module()
    model.backbone = backbone()
    load_checkpoint(model, path, map_location="cpu", revise_keys=[(r"^", "backbone.")])


WAYS = [read_checkpoint, load_as_init_cfg, load_as_load_from]


# ------------------------------------------------------------------------------ code in pickles


def commands(mark):
    yield "system", Call(os.system, f"touch {mark}")
    yield "eval", Call(eval, f"open({str(mark)!r}, 'w')")
    yield "open", Call(open, str(mark), "w")
    yield "getattr", Call(getattr, Call(__import__, "os"), "system")
    yield "load", Call(torch.load, Call(open, str(mark), "w"))
    yield "loads", Call(pickle.loads, pickle.dumps(Call(open, str(mark), "w")))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [name for name, _ in commands("")])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_and_not_run(way, kind, legacy, weights, tmp_path):
    mark = tmp_path / "executed"
    content = {**weights, "stages.0.pos_embed": dict(commands(mark))[kind]}
    path = save(tmp_path / "bad.pth", content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"bad.pth is refused and nothing in it was run: it pickl"):
        way(path)
    assert not mark.exists()


@pytest.mark.parametrize("option", ["load_from", "resume", "last_checkpoint"])
def test_the_runner_refuses_it_too(option, root, shapes, tmp_path):
    pytest.importorskip("mmdet")
    bad = save(tmp_path / "bad.pth", dict(x=Call(os.system, f"touch {tmp_path / 'executed'}")))
    cfg = config(root, shapes, "retinanet", tmp_path)
    cfg.resume = option != "load_from"
    if option == "last_checkpoint":
        (tmp_path / option).write_text(bad)
    else:
        cfg.load_from = bad
    with pytest.raises(ValueError, match=r"bad.pth is refused .*posix.system"):
        Runner.from_cfg(cfg).train()
    assert not (tmp_path / "executed").exists()


def test_a_config_in_a_checkpoint_is_not_executed(root, shapes, tmp_path):
    """MMEngine 0.10.7 does so on `--resume`: a plain string, which no unpickler stops."""
    pytest.importorskip("mmdet")
    runner = Runner.from_cfg(config(root, shapes, "retinanet", tmp_path))
    mark = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    content = dict(
        state_dict=runner.model.state_dict(),
        meta=dict(epoch=0, iter=1, config=code),
        message_hub=runner.message_hub.state_dict(),
    )
    torch.save(content, tmp_path / "crafted.pth")
    cfg = config(root, shapes, "retinanet", tmp_path)
    cfg.resume, cfg.load_from = True, str(tmp_path / "crafted.pth")
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    assert not mark.exists()


def test_a_config_is_a_program(tmp_path):
    """As documented: MMEngine runs a config, ours or not, so a config is to be read like code."""
    (tmp_path / "config.py").write_text(
        f"x = __import__('pathlib').Path({str(tmp_path / 'executed')!r}).touch()\n"
    )
    Config.fromfile(tmp_path / "config.py")
    assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------- damaged and swollen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(way, kept, legacy, weights, tmp_path):
    path = save(tmp_path / "cut.pth", weights, _use_new_zipfile_serialization=not legacy)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(ValueError, match=r"cut\.pth (cannot be read as a|is no) checkpoint"):
        way(path)


@pytest.mark.parametrize("way", WAYS)
def test_compressed_archives_are_refused(way, weights, tmp_path):
    path = save(tmp_path / "plain.pth", {**weights, "zeros": torch.zeros(1 << 22)})
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"bomb.pth is refused: .* unpacks to more than"):
        way(str(bomb))


def claiming(tensor, shape):
    """A pickle that claims a contiguous `shape` for the few bytes of `tensor`."""

    class Claim:
        def __reduce__(self):
            storage = torch.storage.TypedStorage(
                wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
            )
            strides = torch.empty(shape, device="meta").stride()
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (storage, 0, shape, strides, False, {})

    return Claim()


SHAPES = [(1, 10**6, 32), (1, 10**12, 32)]


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_shape_that_is_not_stored_is_refused(way, shape, expanded, legacy, weights, tmp_path):
    few = torch.zeros(1, 1, 32)
    huge = few.expand(shape) if expanded else claiming(few, shape)
    content = {**weights, "stages.0.pos_embed": huge}
    path = save(tmp_path / "huge.pth", content, _use_new_zipfile_serialization=not legacy)
    assert os.path.getsize(path) < 1e7
    message = r"stages.0.pos_embed claims the shape|cannot be read|claim more bytes than the file"
    with pytest.raises(ValueError, match=message):
        way(path)


# ----------------------------------------------------------------------------------- wrong kinds


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.to(torch.complex64), TypeError, "is torch.complex64 in the checkpoint but"),
        (lambda t: t.long(), TypeError, "is torch.int64 in the checkpoint but torch.float32 here"),
        (lambda t: t > 0, TypeError, "is torch.bool in the checkpoint"),
        (lambda t: t.tolist(), TypeError, "must be a tensor, the checkpoint has list"),
        (lambda t: None, TypeError, "must be a tensor, the checkpoint has NoneType"),
        (lambda t: t.to_sparse(), ValueError, "must be dense"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), ValueError, "must be dense"),
        (lambda t: t[0], ValueError, r"has shape \(3136, 32\) in the checkpoint but \(1, 3136"),
        (lambda t: t.sum(), ValueError, r"has shape \(\) in the checkpoint"),
        (lambda t: t[:, :0], ValueError, "must have a square grid"),
    ],
)
def test_other_kinds_of_tensors_are_refused(way, change, error, message, weights, tmp_path):
    changed = change(weights["stages.0.pos_embed"])
    path = save(tmp_path / "odd.pth", {**weights, "stages.0.pos_embed": changed})
    with pytest.raises(error, match=rf"stages.0.pos_embed {message}"):
        way(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_other_precisions_load(way, dtype, weights, tmp_path):
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    way(save(tmp_path / "half.pth", cast))


@pytest.mark.parametrize("content", [[1, 2], 3, {}, {1: torch.ones(1)}, dict(state_dict=[1])])
def test_other_contents_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "strange.pth")
    with pytest.raises(
        ValueError, match=r"strange.pth (must hold a dict of tensors|holds no SOFT)"
    ):
        load_as_init_cfg(str(tmp_path / "strange.pth"))


@pytest.mark.parametrize("grid", [(0, 0), (7, 7), "ab", 5, (None, None), (56, 56)])
def test_a_false_note_of_the_grid_does_no_harm(grid, weights, tmp_path):
    weights._metadata["stages.0"]["pos_grid"] = grid
    path = save(tmp_path / "noted.pth", weights)
    for way in WAYS:
        way(path)
