"""Malicious, corrupt and malformed checkpoints; configs, which are programs."""

import argparse
import os
import pickle
import random
import threading
import warnings
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import crafted_pickles
import numpy as np
import pytest
import torch
from crafted_pickles import CLAIMS, LEGACY_CLAIMS, NUMPY_CLAIMS, Call
from fault_runs import config
from metrics import same
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from operators import before_torch
from released import SMALL
from torch import nn

import mmsoft.checkpoint.loader  # noqa: F401  (for what goes through MMEngine)
from mmsoft import safe_globals
from mmsoft.checkpoint import read_checkpoint
from mmsoft.models import SOFTPlusPlus
from mmsoft.safe_globals import load

pytestmark = pytest.mark.cpu(reason="files")


def save(path, weights, **options):
    torch.save(dict(state_dict=weights, meta=dict(epoch=1, iter=1)), path, **options)
    return str(path)


def backbone(**options):
    return SOFTPlusPlus(SMALL, **options)


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
    yield "Namespace", argparse.Namespace(x=Call(os.system, f"touch {mark}"))
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


class Touch(nn.Module):
    """Makes a file when a TorchScript archive restores it."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark

    def forward(self) -> int:
        return 0

    @torch.jit.export
    def __getstate__(self):
        # type: () -> Tuple[str, bool]
        return self.mark, self.training

    @torch.jit.export
    def __setstate__(self, state):
        # type: (Tuple[str, bool]) -> None
        self.mark = state[0]
        self.training = torch.from_file(state[0], True, 1).numel() > 1


@pytest.fixture
def program(tmp_path):
    """A TorchScript archive with its members stored, and the file that it makes when it is run."""
    path, mark = tmp_path / "program.pth", tmp_path / "executed"
    torch.jit.script(Touch(str(mark))).save(str(path))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    torch.jit.load(str(path))
    assert mark.exists()
    mark.unlink()
    return path, mark


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("older", [False, True])
def test_a_torchscript_archive_is_refused_and_not_run(way, older, program, monkeypatch):
    """torch before 2.6 runs it, whatever unpickler it is given (CVE-2025-32434)."""
    if older:
        for module in ("safe_globals", "checkpoint.loader"):
            monkeypatch.setattr(f"mmsoft.{module}.RESTRICTED", False)
    path, mark = program
    with pytest.raises(ValueError, match=r"program.pth is refused: a TorchScript archive"):
        way(str(path))
    assert not mark.exists()


@pytest.mark.parametrize("member", ["constants.pkl", "code/__torch__.py"])
def test_a_checkpoint_with_a_part_of_a_program_is_refused(member, weights, tmp_path):
    path = save(tmp_path / "part.pth", weights)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"part/{member}", b"")
    with pytest.raises(ValueError, match=r"part.pth is refused: a TorchScript archive"):
        read_checkpoint(path)


@pytest.mark.parametrize("option", ["load_from", "resume", "last_checkpoint"])
def test_the_runner_refuses_code_in_a_checkpoint(option, root, shapes, tmp_path):
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


# ------------------------------------------------------------------------- truncated and compressed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(way, kept, legacy, weights, tmp_path):
    path = save(tmp_path / "cut.pth", weights, _use_new_zipfile_serialization=not legacy)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(ValueError, match=r"cut\.pth (cannot be read as|is not) a checkpoint"):
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


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("legacy", [False, True])
def test_an_expanded_tensor_is_refused(way, legacy, weights, tmp_path):
    """Of a size below the file's, which reading alone allows."""
    expanded = torch.zeros(1, 1, 32).expand(1, 3136, 32)
    content = {**weights, "stages.0.pos_embed": expanded}
    path = save(tmp_path / "huge.pth", content, _use_new_zipfile_serialization=not legacy)
    read_checkpoint(path)
    with pytest.raises(ValueError, match=r"stages.0.pos_embed claims the shape"):
        way(path)


# ----------------------------------------------------- small files that would take a lot of memory

CRAFTED = [
    *((case, legacy) for case in (NUMPY_CLAIMS | CLAIMS).items() for legacy in (False, True)),
    *((case, True) for case in LEGACY_CLAIMS.items()),
]


@pytest.mark.parametrize("read", [read_checkpoint, CheckpointLoader.load_checkpoint])
@pytest.mark.parametrize(
    ("case", "legacy"), CRAFTED, ids=lambda value: value[0] if isinstance(value, tuple) else None
)
def test_claims_beyond_the_file_are_refused(case, legacy, read, tmp_path):
    _, (pickled, message) = case
    crafted_pickles.save(tmp_path / "small.pth", pickled, legacy, storages={"0": b"12345678"})
    with pytest.raises(ValueError, match=rf"small.pth (is refused|cannot be read).*: .*{message}"):
        read(str(tmp_path / "small.pth"))


MEMORY = """
import pathlib, re, resource, sys
import crafted_pickles
from mmsoft import safe_globals
from mmsoft.checkpoint import read_checkpoint
from mmsoft.checkpoint.loader import load_from_local

def peaks():
    status = pathlib.Path("/proc/self/status").read_text()
    return [int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) / 1024 for key in ("VmPeak", "VmHWM")]

path = pathlib.Path(sys.argv[1])
crafted_pickles.save(path, crafted_pickles.FEW)
for read in (read_checkpoint, load_from_local):  # what these import at first
    read(str(path))
limit = int(peaks()[0] + 3 * 1024) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cases = {**crafted_pickles.NUMPY_CLAIMS, **crafted_pickles.CLAIMS}
jobs = []
for read in (read_checkpoint, load_from_local):
    jobs += [(read, case, legacy) for case in cases for legacy in (False, True)]
for read, name, legacy in jobs:
    pickled, _ = cases[name]
    crafted_pickles.save(path, pickled, legacy, storages={"0": b"12345678"})
    before = peaks()
    try:
        read(str(path))
    except Exception:
        pass
    grown = max(after - b for after, b in zip(peaks(), before))
    if grown > 64:
        print(f"{read.__name__} of {name}, legacy {legacy}: {grown:.0f} MiB")
print("done")
"""


def test_refused_claims_take_no_memory(root, run_outside):
    """A claimed array is not allocated before it is refused."""
    path = os.pathsep.join([str(root), str(root / "tests/helpers")])
    done = run_outside("-c", MEMORY, "small.pth", PYTHONPATH=path)
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]


def test_a_pickle_followed_by_a_zip_archive_is_checked_as_a_pickle(weights, tmp_path):
    """zipfile finds the archive, but torch reads the pickle."""
    crafted_pickles.save(tmp_path / "both.pth", CLAIMS["bytearray"][0], legacy=True)
    archive = Path(save(tmp_path / "harmless.pth", weights)).read_bytes()
    with open(tmp_path / "both.pth", "ab") as file:
        file.write(archive)
    assert zipfile.is_zipfile(tmp_path / "both.pth")
    for way in WAYS:
        with pytest.raises(ValueError, match="a call of bytearray that stores no bytes"):
            way(str(tmp_path / "both.pth"))


def history():
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    buffer.update(3.0)
    return buffer


LARGE = torch.arange(3000.0).reshape(3, 1000)
NEWER = [] if before_torch("2.6") else [torch.float8_e4m3fn, torch.uint16]
HELD = {
    "values": dict(a=[1, 2.5, None, True, "x", b"bytes", (1, (2,)), {1, 2}, 1 << 70, 1j], b={}),
    "keys": {1: 2, "a": 3, (1, "b"): 4, None: 5, b"c": 6},
    "collections": [Counter("aab"), OrderedDict(a=1), argparse.Namespace(x=[1]), bytearray(b"ab")],
    "numbers of NumPy": [np.float64(1.5), np.float32(2.5), np.int64(3)],
    "arrays": [np.arange(6.0).reshape(2, 3), np.arange(3, dtype=">f8"),
               np.ones(3, np.float32), np.asfortranarray(np.arange(6).reshape(2, 3))],
    "history": history(),
    "types": [torch.ones(2).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8,
              torch.bool, torch.complex64, *NEWER)],
    "views": [LARGE, LARGE.t(), LARGE[1:, ::2], LARGE[0, :1].expand(40, 50), LARGE[:0]],
    "shapes": [torch.tensor(1.0), torch.ones(0, 4), torch.Size([1, 2]), torch.device("cpu")],
    "parameters": [nn.Parameter(LARGE), nn.Parameter(torch.ones(1), requires_grad=False)],
    "sparse": [LARGE.to_sparse(), LARGE.to_sparse_csr()],
    "quantized": [torch.quantize_per_tensor(LARGE, 0.1, 0, torch.qint8)],
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", HELD)
def test_values_that_checkpoints_hold_load(kind, legacy, tmp_path):
    torch.save(HELD[kind], tmp_path / "held.pth", _use_new_zipfile_serialization=not legacy)
    if legacy and kind == "types" and NEWER:  # torch itself cannot
        with pytest.raises(ValueError, match=r"held.pth cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / "held.pth")
        return
    loaded = read_checkpoint(tmp_path / "held.pth")
    assert same(HELD[kind], loaded)
    # Saved again, it loads again.
    torch.save(loaded, tmp_path / "again.pth", _use_new_zipfile_serialization=not legacy)
    assert same(HELD[kind], read_checkpoint(tmp_path / "again.pth"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_changed_byte_loads_or_is_refused(legacy, tmp_path):
    content = dict(state_dict=dict(a=torch.ones(3)), hub=[history(), np.float64(1)], meta=dict(i=1))
    torch.save(content, tmp_path / "good.pth", _use_new_zipfile_serialization=not legacy)
    good, path, refused = (tmp_path / "good.pth").read_bytes(), tmp_path / "bad.pth", 0
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other versions of the pickle protocol
                read_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            refused += 1
    assert refused > 50


def test_checkpoint_of_another_numpy_loads(tmp_path):
    modules = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
    torch.save(np.arange(3.0), tmp_path / "ours.pth")
    with zipfile.ZipFile(tmp_path / "ours.pth") as ours:
        members = {name: ours.read(name) for name in ours.namelist()}
    if not any(modules[0] in data for data in members.values()):
        modules.reverse()
    with zipfile.ZipFile(tmp_path / "theirs.pth", "w") as theirs:
        for name, data in members.items():
            theirs.writestr(name, data.replace(*modules))
    assert load(str(tmp_path / "theirs.pth"), "cpu").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["__init__", "__class__", "_set_default_statistics"])
def test_getattr_is_limited_to_the_statistics(tmp_path, name):
    torch.save(Call(getattr, HistoryBuffer, name), tmp_path / "crafted.pth")
    with pytest.raises(pickle.UnpicklingError, match="refused getattr"):
        load(str(tmp_path / "crafted.pth"), "cpu")


@pytest.mark.skipif(not before_torch("2.6"), reason="for torch before 2.6")
def test_older_torch_warns_once_of_files_that_are_not_trusted(tmp_path):
    safe_globals._warn.cache_clear()
    torch.save(dict(weight=torch.ones(1)), tmp_path / "some.pth")
    with pytest.warns(UserWarning, match=r"does not protect .*CVE-2025-32434.*update torch"):
        read_checkpoint(tmp_path / "some.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_checkpoint(tmp_path / "some.pth")


@pytest.fixture
def older_torch(monkeypatch):
    """As before torch 2.6, with nothing said yet."""
    safe_globals._warn.cache_clear()
    for module in ("safe_globals", "checkpoint.loader"):
        monkeypatch.setattr(f"mmsoft.{module}.RESTRICTED", False)
    yield monkeypatch
    safe_globals._warn.cache_clear()


def test_older_torch_warns_once_where_mmengine_loads_by_itself(older_torch, weights, tmp_path):
    """Before it does, when the model is built: afterwards it is too late."""
    path = save(tmp_path / "some.pth", weights)
    older_torch.setitem(CheckpointLoader._schemes, "", mmengine_checkpoint.load_from_local)
    with pytest.warns(UserWarning, match=r"CVE-2025-32434.*import mmsoft.checkpoint.loader"):
        load_as_load_from(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch 2.4 and 2.5 have a FutureWarning
        load_as_load_from(path)


def test_older_torch_has_nothing_to_warn_of_where_our_loader_is_in_place(older_torch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone()


# ---------------------------------------------------------------------------------- downloaded


@pytest.fixture
def url(tmp_path, monkeypatch):
    """Address of a local server of the folder `served`."""
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("way", WAYS)
def test_code_and_claims_in_a_download_are_refused(way, url, weights, tmp_path):
    """MMEngine's loader of URLs would run the code."""
    mark = tmp_path / "executed"
    content = {**weights, "stages.0.pos_embed": Call(os.system, f"touch {mark}")}
    save(tmp_path / "served/bad.pth", content)
    with pytest.raises(ValueError, match=r"bad.pth is refused and nothing in it was run: it pickl"):
        way(f"{url}bad.pth")
    assert not mark.exists()
    crafted_pickles.save(tmp_path / "served/small.pth", CLAIMS["bytearray"][0])
    with pytest.raises(ValueError, match=r"small.pth is refused: a call of bytearray"):
        way(f"{url}small.pth")


def test_downloads_load_and_are_cached(url, weights, tmp_path):
    save(tmp_path / "served/good.pth", weights)
    for way in WAYS:
        way(f"{url}good.pth?version=1")
    assert (tmp_path / "cache/checkpoints/good.pth").exists()
    (tmp_path / "served/good.pth").unlink()
    content = read_checkpoint(f"{url}good.pth")
    assert same(dict(weights), dict(content["state_dict"]))
    with pytest.raises(HTTPError, match="404"):
        read_checkpoint(f"{url}nowhere.pth")
    assert os.listdir(tmp_path / "cache/checkpoints") == ["good.pth"]


# ------------------------------------------------------------------------- unsuitable content


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
def test_unsuitable_tensors_are_refused(way, change, error, message, weights, tmp_path):
    changed = change(weights["stages.0.pos_embed"])
    path = save(tmp_path / "changed.pth", {**weights, "stages.0.pos_embed": changed})
    with pytest.raises(error, match=rf"stages.0.pos_embed {message}"):
        way(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_other_precisions_load(way, dtype, weights, tmp_path):
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    way(save(tmp_path / "half.pth", cast))


@pytest.mark.parametrize("content", [[1, 2], 3, {}, {1: torch.ones(1)}, dict(state_dict=[1])])
def test_files_without_named_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth (must hold a dict of tensors|holds no SOFT)"):
        load_as_init_cfg(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("grid", [(0, 0), (7, 7), "ab", 5, (None, None), (56, 56)])
def test_a_wrong_grid_in_the_metadata_is_ignored(grid, weights, tmp_path):
    weights._metadata["stages.0"]["pos_grid"] = grid
    path = save(tmp_path / "grid.pth", weights)
    for way in WAYS:
        way(path)
