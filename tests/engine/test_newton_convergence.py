"""The convergence hook in MMEngine's runner."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from released import ARCH

from mmsoft.analysis import capture, newton_residuals
from mmsoft.engine import NewtonConvergenceHook


@MODELS.register_module()
class TinyTrained(BaseModel):
    """A backbone that learns to say nothing."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs, mode="tensor"):
        loss = sum(out.square().mean() for out in self.backbone(inputs))
        return dict(loss=loss)


@DATASETS.register_module()
class Noise(torch.utils.data.Dataset):
    """Eight images of noise."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)))


def runner_of(tmp_path, hook=None, **backbone):
    default = dict(type="mmsoft.SOFTPlusPlus", arch=ARCH, out_indices=(0, 2))
    return Runner.from_cfg(
        Config(
            dict(
                model=dict(type="TinyTrained", backbone={**default, **backbone}),
                work_dir=str(tmp_path),
                train_dataloader=dict(
                    batch_size=2,
                    collate_fn=dict(type="default_collate"),
                    dataset=dict(type="Noise"),
                    sampler=dict(type="DefaultSampler", shuffle=False),
                ),
                train_cfg=dict(by_epoch=False, max_iters=4),
                optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
                custom_hooks=[dict(type="mmsoft.NewtonConvergenceHook", **(hook or {}))],
                experiment_name=tmp_path.name,
                default_scope="mmengine",
            )
        )
    )


def logged(tmp_path):
    lines = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [e for e in entries if any(key.startswith("newton_residual") for key in e)]


def test_residuals_are_logged_at_the_interval(tmp_path):
    steps = 8  # not yet converged: residuals well above rounding
    runner = runner_of(tmp_path, dict(interval=2), newton_steps=steps)
    runner.train()
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4]
    # The learning rate is 0, so the fourth batch can be gone through again.
    with torch.no_grad(), capture(runner.model) as states:
        runner.model(torch.stack([Noise()[i]["inputs"] for i in (6, 7)]))
    for stage in range(3):
        values = torch.cat(
            [
                newton_residuals(state.landmarks, steps=steps)[-1].flatten()
                for (s, _), state in states.items()
                if s == stage
            ]
        )
        assert values.min() > 1e-3
        mean, largest = (entries[1][f"newton_residual/stage{stage}{end}"] for end in ("", "_max"))
        assert mean == pytest.approx(values.mean().item(), rel=1e-3)
        assert largest == pytest.approx(values.max().item(), rel=1e-3)
    assert not any(module._forward_pre_hooks for module in runner.model.modules())


def warnings(tmp_path):
    lines = next(tmp_path.glob("*/*.log")).read_text().splitlines()
    return [line for line in lines if "NewtonConvergenceHook: " in line]


def test_one_warning_with_advice(tmp_path):
    """Two steps cannot invert anything."""
    runner_of(tmp_path, dict(interval=1), newton_steps=2).train()
    (warning,) = warnings(tmp_path)
    assert "WARNING" in warning
    assert "after 2 Newton-Raphson steps" in warning
    assert "solver='direct', or a landmark budget such as max_landmarks=49" in warning
    assert len(logged(tmp_path)) == 4  # the logging goes on


def test_no_warning_while_it_converges(tmp_path):
    runner_of(tmp_path, dict(interval=1), newton_steps=30).train()
    assert not warnings(tmp_path)
    assert len(logged(tmp_path)) == 4


def test_nothing_to_watch_is_said_before_training(tmp_path):
    runner = runner_of(tmp_path, solver="direct")
    with pytest.raises(ValueError, match="which does not iterate: remove the hook"):
        runner.train()
    other = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no softmax-free attention"):
        NewtonConvergenceHook().before_train(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(interval=0), "interval must be a positive integer, got 0"),
        (dict(interval=1.5), "interval must be a positive integer, got 1.5"),
        (dict(threshold=0), "threshold must be positive, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build(dict(type="mmsoft.NewtonConvergenceHook", **options))
