"""The convergence hook in MMEngine's runner."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from released import ARCH

from mmsoft.analysis import capture, newton_residuals
from mmsoft.engine import NewtonConvergenceHook
from mmsoft.engine.hooks import newton_convergence
from mmsoft.models import SOFTPlusPlus

RELEASED = dict(landmarks="released", max_landmarks=None)


class TinyTrained(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, mode="tensor"):
        loss = sum(out.square().mean() for out in self.backbone(inputs))
        return dict(loss=loss)


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)))


def runner_of(tmp_path, **backbone):
    return Runner(
        TinyTrained(SOFTPlusPlus(ARCH, out_indices=(0, 2), **(RELEASED | backbone))),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            collate_fn=dict(type="default_collate"),
            dataset=Noise(),
            sampler=dict(type="DefaultSampler", shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
        custom_hooks=[dict(type="mmsoft.NewtonConvergenceHook", interval=2)],
        experiment_name=tmp_path.name,
    )


def test_residuals_are_logged_at_the_interval(tmp_path):
    steps = 8  # not yet converged: residuals well above rounding
    runner = runner_of(tmp_path, newton_steps=steps)
    runner.train()
    lines = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    entries = [e for e in map(json.loads, lines) if any("newton_residual" in key for key in e)]
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


# ------------------------------------------------------------------------------- without a runner


class Steps:
    """The parts of a runner that the hook uses: model, iteration, logger and visualizer."""

    def __init__(self, **options):
        self.model = SOFTPlusPlus(ARCH, out_indices=(0, 1), **(RELEASED | options))
        self.iter, self.scalars, self.warnings = 0, [], []
        self.logger = logging.Logger("steps")
        self.logger.addHandler(logging.NullHandler())
        self.logger.handle = lambda record: self.warnings.append(
            f"{record.levelname}: {record.getMessage()}"
        )
        self.visualizer = SimpleNamespace(
            add_scalars=lambda scalars, step: self.scalars.append((step, scalars))
        )
        self.hook = NewtonConvergenceHook(interval=2)

    def step(self, forward=True, fails=False):
        self.hook.before_train_iter(self, 0)
        if forward:
            with torch.no_grad():
                self.model(torch.rand(1, 3, 64, 64))
        if not fails:
            self.hook.after_train_iter(self, 0)
            self.iter += 1

    def steps(self, count, **options):
        for _ in range(count):
            self.step(**options)


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks]


def test_one_warning_with_advice():
    steps = Steps(newton_steps=2)
    steps.steps(4)
    (warning,) = steps.warnings
    assert warning.startswith("WARNING: NewtonConvergenceHook: ")
    assert "after 2 Newton-Raphson steps" in warning
    assert "solver='direct', or a landmark budget such as max_landmarks=49" in warning
    assert [step for step, _ in steps.scalars] == [2, 4]  # the logging continues


def test_no_warning_while_it_converges():
    steps = Steps(newton_steps=30)
    steps.steps(2)
    assert not steps.warnings
    assert steps.scalars


def test_models_without_the_iteration_are_refused():
    steps = Steps(solver="direct")
    with pytest.raises(ValueError, match="which does not iterate: remove the hook"):
        steps.hook.before_train(steps)
    steps.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has no softmax-free attention"):
        steps.hook.before_train(steps)


def test_nan_weights_are_warned_of():
    steps = Steps()
    steps.model.stages[1].blocks[0].attn.query.weight.data.fill_(float("nan"))
    steps.step()
    assert not steps.scalars
    steps.step()
    (warning,) = steps.warnings
    assert "the residual is inf, above 0.05" in warning


def test_only_the_main_process_computes(monkeypatch):
    monkeypatch.setattr(newton_convergence, "is_main_process", lambda: False)
    steps = Steps()
    steps.steps(2)
    assert not steps.scalars
    assert not steps.warnings


def test_a_failed_iteration_leaves_no_state():
    steps = Steps()
    steps.step()
    steps.step(fails=True)
    assert hooks(steps.model)
    steps.iter += 1
    steps.hook.before_train_iter(steps, 0)
    assert not hooks(steps.model)
    steps.step()
    assert not steps.scalars  # those of the failed pass are not of this iteration
    steps.step()
    assert [step for step, _ in steps.scalars] == [4]


def test_layers_without_iteration_are_skipped():
    steps = Steps()
    for block in steps.model.stages[0].blocks:
        block.attn.solver = "direct"
    steps.hook.before_train(steps)
    steps.steps(2)
    ((_, scalars),) = steps.scalars
    assert scalars.keys() == {"newton_residual/stage1", "newton_residual/stage1_max"}


def test_a_wrapped_model():
    steps = Steps()
    steps.model = torch.nn.DataParallel(steps.model)
    steps.hook.before_train(steps)
    steps.steps(2)
    ((_, scalars),) = steps.scalars
    assert len(scalars) == 4


def test_layers_that_do_not_run_are_warned_of_once():
    steps = Steps()
    steps.steps(4, forward=False)
    (warning,) = steps.warnings
    assert "saw no attention layer run: the model is compiled, or skips them" in warning
    assert not steps.scalars


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
