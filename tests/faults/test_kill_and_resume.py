"""SIGKILL at any point of a training run, then `--resume`, through the real runner."""

import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import mmsoft.models  # noqa: F401  (puts our checkpoint hook in MMEngine's place)

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
    """End the run in the middle, as a kill would for what is in memory."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path):
    count = iter(range(100))

    def run(epochs=4, *, resume=False, stop=None, hooks=(), workers=1, seed=0, **checkpoint):
        checkpoint.setdefault("interval", 1)
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
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", max_keep_ckpts=1, **checkpoint)
            ),
            custom_hooks=[*hooks, *([StopAt(stop)] if stop is not None else [])],
            randomness=dict(seed=seed),
            resume=resume,
            log_level="WARNING",
            experiment_name=f"kill-{tmp_path.name}-{next(count)}",
        )
        torch.manual_seed(0)
        runner.model.layer.reset_parameters()
        runner.train()
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


def test_without_the_hook_it_does_not(run):
    """What RandomStateHook is for: MMEngine alone draws other numbers after a resume."""
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


def test_random_state_hook_says_what_it_needs(run):
    with pytest.raises(ValueError, match=r"needs a seed: set randomness=dict\(seed=...\)"):
        run(hooks=RANDOM_STATE, seed=None)
    with pytest.raises(ValueError, match="num_workers >= 1"):
        run(hooks=RANDOM_STATE, workers=0)


def test_a_failed_write_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    from mmengine.fileio import LocalBackend

    whole = weights(run(hooks=RANDOM_STATE))
    run(2, hooks=RANDOM_STATE)  # starts anew
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


def test_resume_takes_the_newest_complete_checkpoint(run, tmp_path):
    work = tmp_path / "work"
    run(2)
    whole = (work / "epoch_2.pth").read_bytes()

    def resume(pointer, **files):
        (work / "last_checkpoint").write_text(pointer)
        for name, content in files.items():
            (work / f"{name}.pth").write_bytes(content)
        run(4, resume=True, interval=100, save_last=False)
        return (work / "last_checkpoint").read_text()

    for pointer, files in (
        ("", {}),  # truncated
        (str(work / "epoch_9.pth"), {}),  # gone
        (str(work / "epoch_3.pth"), dict(epoch_3=whole[:-100])),
        (str(work / "epoch_3.pth"), dict(epoch_3=b"")),
    ):
        (work / "epoch_3.pth").unlink(missing_ok=True)
        assert resume(pointer, **files) == str(work / "epoch_2.pth")
    # Nothing to mend: what is named is whole, and the newest.
    assert resume(str(work / "epoch_2.pth")) == str(work / "epoch_2.pth")
    (work / "epoch_3.pth").unlink(missing_ok=True)
    for path in work.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot resume: .*epoch_2.pth.* truncated"):
        resume(str(work / "epoch_2.pth"))


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


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.long
@pytest.mark.parametrize("package", CONFIGS)
def test_ten_kills(package, root, tmp_path):
    pytest.importorskip(package)
    base, options, last = CONFIGS[package]
    script = root / "tools/dataset_converters/make_shapes.py"
    sizes = ["--train", "12", "--val", "4", "--size", "64"]
    subprocess.run([sys.executable, str(script), "data/shapes", *sizes], cwd=tmp_path, check=True)
    text = f"        _base_ = {str(root / 'configs/demo' / base)!r}\n{options}{COMMON}"
    config = tmp_path / "config.py"
    config.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    train = Path(find_spec(package).origin).parent / ".mim/tools/train.py"  # as mim does
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

    def run(work_dir, kill, *flags):
        command = [sys.executable, str(train), str(config), "--work-dir", str(tmp_path / work_dir)]
        done = subprocess.run(
            [*command, *flags],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "MMSOFT_TEST_KILL": kill,
            },
            capture_output=True,
            text=True,
        )
        expected = 0 if kill == "never" else -signal.SIGKILL
        assert done.returncode == expected, f"{kill}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    run("whole", "never")
    start = []
    for kill in ten_points():
        log = run("killed", kill, "--resume")
        start.append(log.split("resumed epoch: ")[-1].split("\n")[0] if "resumed" in log else "")
        if kill.startswith("write"):
            assert list((tmp_path / "killed").glob("*.pth.partial"))  # cut short
        print(kill, "|", start[-1], "|", sorted(os.listdir(tmp_path / "killed")))
    run("killed", "never", "--resume")
    whole, killed = (
        torch.load(tmp_path / name / last, weights_only=True) for name in ("whole", "killed")
    )
    for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert same(whole[key], killed[key]), key
    assert whole["meta"]["iter"] == killed["meta"]["iter"]
