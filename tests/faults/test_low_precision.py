"""bfloat16 and float16 compared with float32: no NaN, and similar loss curves."""

from itertools import combinations

import numpy as np
import pytest
import torch
from fault_runs import config, plain_loop, train, weights_are_finite
from metrics import error
from mmengine.device import get_device
from mmengine.hub import get_config

import mmsoft.models  # noqa: F401

for library in ("mmdet", "mmseg"):
    pytest.importorskip(library)
pytestmark = pytest.mark.runner

ITERATIONS = 200


def smooth(losses):
    return np.convolve(losses, np.full(25, 1 / 25), "valid")


def apart(*curves):
    """The largest mean distance of two of the loss curves."""
    return max(np.abs(smooth(a) - smooth(b)).mean() for a, b in combinations(curves, 2))


@pytest.fixture
def float32_scores(monkeypatch):
    """mmcv's NMS has no bfloat16 for CPUs."""
    from mmcv.ops.nms import NMSop

    suppress = torch.amp.custom_fwd(
        NMSop.forward, device_type=get_device(), cast_inputs=torch.float32
    )
    monkeypatch.setattr(NMSop, "forward", staticmethod(suppress))


def with_torchvisions_roi_align(cfg):
    """As docs/cuda.md says: mmcv's has no bfloat16."""
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        cfg.merge_from_dict({f"model.roi_head.{name}.roi_layer.use_torchvision": True})
    return cfg


def test_torchvisions_roi_align_takes_bfloat16():
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    cfg = get_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model.roi_head
    cfg = cfg.bbox_roi_extractor
    cfg.pop("type")
    features = [torch.randn(2, cfg.out_channels, n, n) for n in (32, 16, 8, 4)]
    rois = torch.tensor([[0.0, 3, 5, 50, 60], [1, 20, 0, 110, 127]])

    def run(dtype, **options):
        extract = SingleRoIExtractor(**cfg | dict(roi_layer=cfg.roi_layer | options))
        extract.to(get_device())
        with torch.autocast(get_device(), torch.bfloat16):
            return extract([x.to(get_device(), dtype) for x in features], rois.to(get_device()))

    with pytest.raises(RuntimeError, match="BFloat16"):
        run(torch.bfloat16)
    ours = run(torch.bfloat16, use_torchvision=True)
    assert ours.dtype == torch.bfloat16
    assert error(ours, run(torch.float32)) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("solver", ["newton", "direct"])
@pytest.mark.parametrize("model", ["mask_rcnn", "upernet"])
def test_bfloat16_trains_like_float32(model, solver, root, shapes, tmp_path, float32_scores):
    def run(dtype, seed=0):
        cfg = config(root, shapes, model, tmp_path)
        if model == "mask_rcnn":
            with_torchvisions_roi_align(cfg)
        cfg.model.backbone.update(solver=solver)
        return plain_loop(cfg, ITERATIONS, dtype, seed)

    reference = run(None)
    low = run(torch.bfloat16)
    assert np.isfinite(low).all()
    assert smooth(low)[-1] < 0.9 * smooth(low)[0]  # it learns
    # Noise: how far float32 runs are apart that see the images in another order.
    noise = apart(reference, *(run(None, seed) for seed in (1, 2)))
    distance = apart(reference, low)
    print(f"{model}, {solver}: distance {distance:.4f}, noise {noise:.4f}, loss {low[-25:].mean()}")
    assert distance <= noise


@pytest.mark.long
@pytest.mark.skipif(not torch.cuda.is_available(), reason="MMEngine's AMP needs a GPU")
@pytest.mark.parametrize("model", ["mask_rcnn", "upernet"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp_trains_with_finite_weights(model, dtype, root, shapes, tmp_path):
    cfg = config(root, shapes, model, tmp_path, iterations=60)  # seconds, of a GPU's nine minutes
    cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype=dtype)
    cfg.custom_hooks = [dict(type="mmsoft.FiniteGradientHook")]
    if (model, dtype) == ("mask_rcnn", "bfloat16"):
        with_torchvisions_roi_align(cfg)
    runner, losses = train(cfg)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])
    assert weights_are_finite(runner)
