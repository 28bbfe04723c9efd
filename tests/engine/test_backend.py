"""The hook that asks for the Triton kernels, in MMEngine's runner."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from released import SMALL
from required import need_triton

from mmsoft.engine import BackendHook
from mmsoft.models import SOFTPlusPlus
from mmsoft.ops import launch
from mmsoft.ops.backends import OPERATIONS


class Trained(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = SOFTPlusPlus(SMALL, landmarks="released", newton_steps=1)

    def forward(self, inputs, mode="tensor"):
        return dict(loss=sum(out.square().mean() for out in self.backbone(inputs)))


def test_a_training_runs_with_kernels_and_what_follows_without(tmp_path, monkeypatch):
    need_triton()
    from mmsoft.ops.gaussian import triton as products
    from mmsoft.ops.inverse import triton as inverses

    ran = set()

    def noted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: ran.add(name) or function(*args))

    names = {"product", "product_backward", "newton", "newton_backward"}
    for name in names:
        noted(products if "product" in name else inverses, name)
    runner = Runner(
        Trained(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=1,
            collate_fn=dict(type="default_collate"),
            dataset=[dict(inputs=torch.randn(3, 32, 32))],
            sampler=dict(type="DefaultSampler", shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
        custom_hooks=[dict(type="mmsoft.BackendHook")],
        experiment_name=tmp_path.name,
    )
    runner.train()
    assert ran == names
    ran.clear()
    runner.model(torch.randn(1, 3, 32, 32))["loss"].backward()
    assert not ran
    assert all(operation.asked is None for operation in OPERATIONS.values())


def test_it_says_where_no_kernel_can_run(caplog, monkeypatch):
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})  # as without the interpreter
    logger = logging.getLogger("backend")
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), logger=logger)
    for backend, said in (("triton", True), ("eager", False)):
        caplog.clear()
        hook = BackendHook(backend, strict=True)
        hook.before_run(runner)
        assert OPERATIONS["tikhonov_solve"].asked == backend
        assert OPERATIONS["tikhonov_solve"].strict
        hook.after_run(runner)
        assert OPERATIONS["tikhonov_solve"].asked is None
        assert ("no Triton kernel can run: the tensors are on cpu" in caplog.text) is said


def test_unknown_names_are_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match="got 'cuda'"):
        BackendHook("cuda")
    with pytest.raises(ValueError, match="got 'product'"):
        BackendHook(operations=("product",))
