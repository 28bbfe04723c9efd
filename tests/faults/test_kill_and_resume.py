"""SIGKILL at any point of a training run, then `--resume`, through the real runner."""

import os
import random
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crafted_pickles import Call
from killer import end_at
from metrics import same
from mmengine.dataset import DefaultSampler
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner, find_latest_checkpoint
from torch import nn
from true_layout import make_demo_data

from mmsoft.checkpoint import read_checkpoint
from mmsoft.engine import CheckpointHook
from mmsoft.engine.hooks import checkpoint as checkpoint_hook

pytestmark = pytest.mark.cpu(reason="processes that are killed, and files")

# ------------------------------------------------------------------- the checkpoint hook alone


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(x=torch.rand(3) + index)  # of the worker's generator


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mode="tensor"):
        x = torch.stack(x)
        return dict(loss=self.drop(self.layer(x)).square().mean())


class StopAt(Hook):
    """End the run as a kill would, losing what is in memory."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


class NoteStart(Hook):
    """Note the first iteration of a run as `runner.start`."""

    def before_train(self, runner):
        runner.start = runner.iter


@pytest.fixture
def run(tmp_path):
    count = iter(range(100))

    def run(epochs=4, *, resume=False, stop=None, hooks=(), workers=1, seed=0, **checkpoint):
        checkpoint = dict(interval=1, max_keep_ckpts=1) | checkpoint
        runner = Runner(
            Toy(),
            work_dir=str(tmp_path / "work"),
            train_dataloader=dict(
                batch_size=2,
                num_workers=workers,
                persistent_workers=workers > 0,
                dataset=Noise(),
                sampler=dict(type=DefaultSampler, shuffle=True),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
            default_hooks=dict(checkpoint=dict(type="mmsoft.CheckpointHook", **checkpoint)),
            custom_hooks=[NoteStart(), *hooks, *([StopAt(stop)] if stop is not None else [])],
            randomness=dict(seed=seed),
            resume=bool(resume),
            load_from=resume if isinstance(resume, str) else None,
            log_level="WARNING",
            experiment_name=f"kill-{tmp_path.name}-{next(count)}",
        )
        torch.manual_seed(0)
        runner.model.layer.reset_parameters()
        try:
            runner.train()
        finally:
            runner.train_dataloader._iterator = None  # ends its workers
        return runner

    return run


def weights(runner):
    return torch.cat([p.detach().flatten() for p in runner.model.parameters()])


RANDOM_STATE = [dict(type="mmsoft.RandomStateHook")]


def test_a_resumed_run_equals_an_uninterrupted_one(run):
    whole = weights(run(hooks=RANDOM_STATE))
    with pytest.raises(KeyboardInterrupt):
        run(hooks=RANDOM_STATE, stop=8)
    resumed = run(hooks=RANDOM_STATE, resume=True)
    assert resumed.iter == 12
    assert torch.equal(weights(resumed), whole)


def test_without_the_hook_a_resumed_run_differs(run):
    """MMEngine alone draws other random numbers after a resume."""
    whole = weights(run())
    with pytest.raises(KeyboardInterrupt):
        run(stop=8)
    assert not torch.equal(weights(run(resume=True)), whole)


def test_epochs_iterations_and_workers_draw_different_numbers(run):
    drawn = []

    class Record(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            drawn.append((torch.rand(()).item(), *(float(x[0] % 1) for x in data_batch["x"])))

    run(hooks=[*RANDOM_STATE, Record()], workers=2)
    assert len({number for batch in drawn for number in batch}) == 12 * 3


def test_random_state_hook_needs_a_seed_and_workers(run):
    with pytest.raises(ValueError, match=r"needs a seed: set randomness=dict\(seed=...\)"):
        run(hooks=RANDOM_STATE, seed=None)
    with pytest.raises(ValueError, match="num_workers >= 1"):
        run(hooks=RANDOM_STATE, workers=0)


def test_a_failed_write_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    whole = weights(run(hooks=RANDOM_STATE))
    run(2, hooks=RANDOM_STATE)  # starts from the beginning
    with monkeypatch.context() as patch:

        def full(self, data, path):
            Path(path).write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        patch.setattr(LocalBackend, "put", full)
        with pytest.raises(OSError, match="No space"):
            run(resume=True, hooks=RANDOM_STATE)
    assert torch.load(tmp_path / "work/epoch_2.pth")["meta"]["epoch"] == 2
    resumed = run(resume=True, hooks=RANDOM_STATE)
    assert torch.equal(weights(resumed), whole)
    assert [p.name for p in (tmp_path / "work").glob("*.pth*")] == ["epoch_4.pth"]


# ------------------------------------------------------------------- what a run is resumed from


@pytest.fixture
def work(tmp_path):
    """A folder to put checkpoints in, and to ask what a run in it would be resumed from."""
    return Work(tmp_path / "work")


class Work:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.log = []

    def save(self, name, iterations, epochs=0, *, legacy=False, kept=1.0, **meta):
        meta = dict(iter=iterations, epoch=epochs) | meta
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        content = dict(meta=meta, state_dict=dict(x=torch.ones(9)), message_hub={})
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        return path

    def point(self, path):
        path = path if isinstance(path, bytes) else os.fsencode(path)
        (self.folder / "last_checkpoint").write_bytes(path)

    def files(self):
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in self.folder.rglob("*.*")}

    def resumed_from(self, **options):
        """The name of the file, which must be in `last_checkpoint` when MMEngine looks there."""
        logger = SimpleNamespace(warning=self.log.append)
        folder = str(self.folder)
        CheckpointHook(**options).before_run(
            SimpleNamespace(work_dir=folder, _resume=True, _load_from=None, logger=logger)
        )
        found = find_latest_checkpoint(folder)
        return found and os.path.relpath(found, self.folder)


@pytest.mark.parametrize("named", ["epoch_1.pth", "best_mIoU_epoch_1.pth", "elsewhere/x.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_complete_checkpoint_in_last_checkpoint_is_taken(named, legacy, work):
    work.save("epoch_2.pth", 6, 2)
    work.point(work.save(named, 3, 1, legacy=legacy))
    work.save("epoch_3.pth", 9, 3)
    before = work.files()
    assert work.resumed_from() == named
    assert work.files() == before  # and nothing is written
    assert not work.log


@pytest.mark.parametrize(
    "pointer", [None, "", "\0\0", b"\xff", "gone/epoch_9.pth", "truncated.pth", "other.pth"]
)
@pytest.mark.parametrize("order", ["forwards", "backwards", "same"])
def test_otherwise_the_checkpoint_of_most_iterations_is_taken(pointer, order, work):
    """Copies and restores change times; the order of names is not that of numbers."""
    times = dict(forwards=[1, 2, 3], backwards=[3, 2, 1], same=[1, 1, 1])[order]
    for epoch, time in zip((2, 10, 9), times):
        os.utime(work.save(f"epoch_{epoch}.pth", 3 * epoch, epoch), (time, time))
    work.save("epoch_11.pth", 33, 11, kept=0.9)
    work.save("iter_999.pth", 999)  # of a run that counts otherwise
    work.save("best_mIoU_epoch_12.pth", 36, 12)  # without the state of the optimizer
    work.save("truncated.pth", 999, 999, kept=0.5)
    torch.save(dict(meta=[]), work.folder / "other.pth")
    if pointer is not None:
        work.point(work.folder / pointer if str(pointer).endswith("pth") else pointer)
    assert work.resumed_from() == "epoch_10.pth"
    (message,) = work.log
    assert "most iterations" in message
    assert "epoch_10.pth (iteration 30, epoch 10)" in message
    assert "epoch_11.pth cannot be read as a checkpoint: truncated" in message
    after = work.files()
    assert work.resumed_from() == "epoch_10.pth"
    assert work.files() == after
    assert len(work.log) == 1


def test_iterations_are_read_from_the_file_and_not_its_name(work):
    work.save("epoch_3.pth", 3, 1)
    work.save("epoch_1.pth", 9, 3)
    work.save("epoch_9.pth", 6, 2)
    assert work.resumed_from() == "epoch_1.pth"


def test_ties_are_broken_by_epochs_and_then_by_path(work):
    work.save("epoch_1.pth", 9, 1)
    work.save("epoch_2.pth", 9, 2)
    work.save("epoch_3.pth", 8, 3)
    assert work.resumed_from() == "epoch_2.pth"
    work.save("epoch_4.pth", 9, 2)  # a copy
    (work.folder / "last_checkpoint").unlink()
    assert work.resumed_from() == "epoch_4.pth"


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_truncated_file_is_not_complete(named, legacy, kept, work):
    work.save("iter_7.pth", 7, legacy=legacy)
    truncated = work.save("iter_8.pth", 8, legacy=legacy, kept=kept)
    if named:
        work.point(truncated)
    assert work.resumed_from(by_epoch=False) == "iter_7.pth"


@pytest.mark.parametrize("named", [False, True])
def test_a_refused_file_is_not_taken_and_not_run(named, work):
    work.save("epoch_1.pth", 3, 1)
    bad = work.save("epoch_2.pth", 6, 2, extra=Call(os.mkdir, str(work.folder / "executed")))
    unsaid = work.save("epoch_3.pth", "9", 3)
    if named:
        work.point(bad)
    assert work.resumed_from() == "epoch_1.pth"
    assert f"{bad} is refused and nothing in it was run" in work.log[0]
    assert f"{unsaid} does not say after how many iterations and epochs" in work.log[0]
    assert not (work.folder / "executed").exists()


def test_out_dir_filename_tmpl_and_moved_folders(work, tmp_path):
    work.save("state-3.pth", 3)
    other = tmp_path / "out" / "work"
    other.mkdir(parents=True)
    work.save(other / "state-5.pth", 5)
    options = dict(by_epoch=False, filename_tmpl="state-{}.pth", out_dir=str(tmp_path / "out"))
    assert work.resumed_from(**options) == "../out/work/state-5.pth"
    work.point(tmp_path / "moved" / "state-9.pth")
    assert work.resumed_from(**options) == "../out/work/state-5.pth"
    (tmp_path / "moved").mkdir()
    work.save(tmp_path / "moved" / "state-8.pth", 8)
    work.point(tmp_path / "moved" / "state-9.pth")
    assert work.resumed_from(**options) == "../moved/state-8.pth"


def test_nothing_to_resume_from(work):
    assert work.resumed_from() is None  # MMEngine starts from the beginning
    assert os.listdir(work.folder) == []
    work.point("s3://bucket/epoch_3.pth")
    work.save("epoch_1.pth", 3, 1)
    assert work.resumed_from() == os.path.relpath("s3://bucket/epoch_3.pth", work.folder)
    work.point(work.folder / "epoch_9.pth")
    for path in work.folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    before = work.files()
    message = (
        r"cannot resume: .*/epoch_1.pth cannot be read as a checkpoint: truncated.*epoch_9.pth"
    )
    with pytest.raises(ValueError, match=message):
        work.resumed_from()
    assert work.files() == before


def test_every_process_raises_what_the_main_process_found(work, monkeypatch):
    """Otherwise the others would wait for it forever."""
    work.save("epoch_1.pth", 3, 1, kept=0.5)
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_hook, "broadcast_object_list", lambda data: sent.append(data[0]))
        with pytest.raises(ValueError, match="cannot resume"):
            work.resumed_from()
    monkeypatch.setattr(checkpoint_hook, "is_main_process", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_hook, "broadcast_object_list", lambda data: data.__setitem__(0, sent[0])
        )
        with pytest.raises(ValueError, match="cannot resume"):
            work.resumed_from()
    before = work.files()
    assert work.resumed_from() is None  # by itself it does nothing
    assert work.files() == before


def test_flexible_runner_is_left_alone(work):
    runner = FlexibleRunner.__new__(FlexibleRunner)
    runner._resume, runner._load_from, runner._work_dir = True, None, str(work.folder)
    work.save("epoch_1.pth", 3, 1)
    CheckpointHook().before_run(runner)
    assert os.listdir(work.folder) == ["epoch_1.pth"]


def test_the_runner_resumes_from_the_chosen_checkpoint(run, tmp_path):
    work = tmp_path / "work"
    run(3, workers=0, max_keep_ckpts=-1)
    pointer = work / "last_checkpoint"
    pointer.write_text(str(work / "epoch_2.pth"))
    assert run(4, resume=True, workers=0, interval=100, save_last=False).start == 6
    pointer.unlink()
    for epoch, time in ((1, 30), (2, 20), (3, 10)):
        os.utime(work / f"epoch_{epoch}.pth", (time, time))
    assert run(4, resume=True, workers=0, interval=100, save_last=False).start == 9
    (work / "epoch_3.pth").write_bytes((work / "epoch_3.pth").read_bytes()[:-100])
    assert run(4, resume=True, workers=0, interval=100, save_last=False).start == 6


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("meta", dict(iter="6"), "does not say after how many iterations and epochs"),
        ("meta", dict(epoch=None), "does not say after how many iterations and epochs"),
        ("meta", dict(seed=[0]), "the seed in the checkpoint is not an integer"),
        ("runtime_info", dict(keep_ckpt_ids=["/../../x"]), "keep_ckpt_ids .* are not integers"),
        ("runtime_info", dict(keep_ckpt_ids="2"), "keep_ckpt_ids .* are not integers"),
    ],
)
def test_invalid_metadata_is_refused(part, change, message, run, tmp_path):
    run(2, workers=0)
    path = tmp_path / "work/epoch_2.pth"
    content = torch.load(path)
    {**content, **content["message_hub"]}[part].update(change)
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"cannot resume: .*{message}"):
        run(4, workers=0, resume=str(path))


class Evaluate(Hook):
    """A validation after every epoch, each better than the last."""

    def after_train_epoch(self, runner):
        (hook,) = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        hook.after_val_epoch(runner, dict(acc=float(runner.epoch)))


BEST = dict(hooks=[Evaluate()], workers=0, save_best="acc", rule="greater")


def test_the_best_checkpoint_replaces_the_former(run, tmp_path):
    run(3, **BEST)
    names = sorted(path.name for path in (tmp_path / "work").glob("*.pth*"))
    assert names == ["best_acc_epoch_2.pth", "epoch_3.pth"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_outside_the_folder_is_removed(kind, run, tmp_path):
    """The path of the previous best checkpoint is read from the file that is resumed from."""
    run(2, **BEST)
    path, outside = tmp_path / "work/epoch_2.pth", tmp_path / "outside"
    if kind == "file":
        outside.touch()
    else:
        (outside / "full").mkdir(parents=True)
    content = torch.load(path)
    content["message_hub"]["runtime_info"]["best_ckpt"] = str(outside)
    torch.save(content, path)
    run(4, resume=True, **BEST)
    assert (tmp_path / "work/best_acc_epoch_3.pth").exists()
    assert outside.exists()


# -------------------------------------------------------------------------- kills while it saves


class Killed(BaseException):
    """Caught by nobody, so that nothing is written after it."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("point", "start", "left"),
    [
        # The third checkpoint, after 9 iterations, is about to replace the second.
        ("before write", 6, [2]),
        ("in write", 6, [2]),
        ("after write", 6, [2]),
        ("before rename", 6, [2]),
        ("after rename", 6, [2, 3]),  # the second is still the one that is named
        ("before pointer", 6, [2, 3]),
        ("in pointer", 9, [2, 3]),
        ("before remove", 9, [2, 3]),
        ("after remove", 9, [3]),
    ],
)
def test_a_kill_at_every_point_of_a_save(point, start, left, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        when, step = point.split()
        # The first is replaced, and so removed, when the second is there.
        end_at(step, 1 if step == "remove" else 2, when, kill, replace=patch.setattr)
        with pytest.raises(Killed):
            run(workers=0)
    names = sorted(path.name for path in (tmp_path / "work").glob("[!.]*.pth"))
    assert names == [f"epoch_{epoch}.pth" for epoch in left]
    resumed = run(workers=0, resume=True)
    assert resumed.start == start
    assert resumed.iter == 12
    last = read_checkpoint((tmp_path / "work/last_checkpoint").read_text())
    assert last["meta"]["iter"] == 12


# --------------------------------------------------------------------------- the real training

CONFIGS = {
    "mmdet": (
        "retinanet_softpp-mini_fpn_shapes.py",
        """
        train_cfg = dict(max_epochs=24, val_interval=2)
        model = dict(backbone=dict(drop_path_rate=0.2), test_cfg=dict(score_thr=0))
        param_scheduler = [
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10),
            dict(type="CosineAnnealingLR", begin=0, end=24, convert_to_iter_based=True),
        ]
        default_hooks = dict(
            checkpoint=dict(interval=1, max_keep_ckpts=1, save_best="auto", rule="greater")
        )
        """,
        "epoch_24.pth",
    ),
    "mmseg": (
        "upernet_softpp-mini_shapes.py",
        """
        train_cfg = dict(max_iters=60, val_interval=6)
        model = dict(backbone=dict(drop_path_rate=0.2))
        default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=2))
        """,
        "iter_60.pth",
    ),
}
COMMON = """
        custom_imports = dict(imports=["killer"])
        custom_hooks = [
            dict(type="mmsoft.RandomStateHook"), dict(type="EMAHook"), dict(type="Killer")
        ]
        randomness = dict(seed=0)
        train_dataloader = dict(batch_size=4)
        default_hooks["logger"] = dict(interval=1)
"""


def ten_points():
    """Ten kills of every kind, at random times and in random order."""
    rng = random.Random(0)
    points = [f"iteration {rng.randrange(4)} {rng.uniform(0, 0.3):.3f}" for _ in range(4)]
    points += [f"write {rng.randrange(2)} {rng.random():.3f}" for _ in range(2)]
    points += ["rename 0", "pointer 0", "remove 0", "evaluation 0"]
    rng.shuffle(points)
    return points


def held(path):
    """Iterations and epochs of a checkpoint that loads."""
    try:
        meta = torch.load(path, weights_only=True)["meta"]
    except (OSError, RuntimeError):
        return None
    return meta["iter"], meta["epoch"]


def expected_start(folder):
    """What a run in this folder should go on from: what is named, or the most iterations."""
    pointer = folder / "last_checkpoint"
    named = pointer.read_text() if pointer.exists() else ""
    if named and (found := held(named)):
        return found
    files = [*folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    return max(filter(None, map(held, files)), default=None)


@pytest.mark.long
@pytest.mark.parametrize("package", CONFIGS)
def test_ten_kills(package, root, tmp_path, run_outside):
    pytest.importorskip(package)
    base, options, last = CONFIGS[package]
    make_demo_data(tmp_path)
    text = f"        _base_ = {str(root / 'configs/demo' / base)!r}\n{options}{COMMON}"
    config = tmp_path / "config.py"
    config.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    train = Path(find_spec(package).origin).parent / ".mim/tools/train.py"  # as mim does
    path = os.pathsep.join([str(root / "tests/helpers"), os.environ.get("PYTHONPATH", "")])

    def run(work_dir, kill, *flags):
        environment = dict(PYTHONPATH=path, OMP_NUM_THREADS="1", MMSOFT_TEST_KILL=kill)
        done = run_outside(train, config, "--work-dir", work_dir, *flags, **environment)
        expected = 0 if kill == "never" else -signal.SIGKILL
        assert done.returncode == expected, f"{kill}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def resume(kill):
        """Iteration and epoch from which the run says that it resumed."""
        expected = expected_start(tmp_path / "killed")
        found = re.findall(r"resumed epoch: (\d+), iter: (\d+)", run("killed", kill, "--resume"))
        start = [(int(iterations), int(epochs)) for epochs, iterations in found]
        assert start == ([expected] if expected else []), kill
        return start[0] if start else (0, 0)

    run("whole", "never")
    starts = []
    for kill in ten_points():
        starts.append(resume(kill))
        if kill.startswith("write"):
            assert list((tmp_path / "killed").glob(".partial-*.pth"))  # cut short
        print(kill, "|", starts[-1], "|", sorted(os.listdir(tmp_path / "killed")))
    starts.append(resume("never"))
    assert starts == sorted(starts)
    assert starts[0] == (0, 0)
    assert len(set(starts)) >= 5  # of eleven: some kills come before there is anything new
    whole, killed = (
        torch.load(tmp_path / name / last, weights_only=True) for name in ("whole", "killed")
    )
    for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert same(whole[key], killed[key]), key
    assert whole["meta"]["iter"] == killed["meta"]["iter"]
