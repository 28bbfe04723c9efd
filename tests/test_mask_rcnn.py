"""Mask R-CNN learns: its loss falls like that with Swin."""

import pytest
from fault_runs import SOFTPP, SWIN, config, plain_loop

pytest.importorskip("mmdet")

ITERATIONS = 90


@pytest.mark.long
def test_learns_as_well_as_with_swin(root, shapes, tmp_path):
    ours = plain_loop(config(root, shapes, "mask_rcnn", tmp_path, backbone=SOFTPP), ITERATIONS)
    swin = plain_loop(config(root, shapes, "mask_rcnn", tmp_path, backbone=SWIN), ITERATIONS)
    print(f"{ours[:10].mean():.2f} -> {ours[-10:].mean():.2f}; Swin {swin[-10:].mean():.2f}")
    assert ours[-10:].mean() <= 0.6 * ours[:10].mean()
    assert ours[-10:].mean() <= swin[-10:].mean()
