"""At initialization the attention is alive, and the same at every resolution."""

import pytest
import torch
from loading import load_tool

from mmsoft.models import SOFT, SOFTPlusPlus

tool = load_tool("analysis_tools/attention_scale.py")

QUICK_SIZES = ((224, 224), (512, 768))
CASES = [(SOFTPlusPlus, None), (SOFTPlusPlus, 256), (SOFTPlusPlus, 49), (SOFT, 49)]


def check(variant, arch, max_landmarks, solver="direct", train=False, sizes=tool.SIZES):
    options = dict(arch=arch, max_landmarks=max_landmarks, landmarks="released", solver=solver)
    columns = tool.scales_by_size(variant, sizes, train, **options)
    for block, row in enumerate(zip(*columns)):
        attention, ratios = [a for a, _ in row], [a / c for a, c in row]
        assert min(ratios) > 0.1, (block, ratios)
        assert max(ratios) < 3, (block, ratios)
        assert max(attention) < 1.5 * min(attention), (block, attention)


@pytest.mark.parametrize(("variant", "max_landmarks"), CASES)
def test_tiny_has_one_scale_at_every_resolution(variant, max_landmarks):
    check(variant, "tiny", max_landmarks, sizes=QUICK_SIZES)


@pytest.mark.parametrize(
    "sizes",
    [QUICK_SIZES, pytest.param((*tool.SIZES, tool.LARGE), marks=pytest.mark.long)],
    ids=["quick", "to 2048"],
)
def test_by_content_the_term_keeps_its_size(sizes):
    columns = tool.scales_by_size(
        SOFTPlusPlus, sizes, arch="tiny", max_landmarks=49, landmarks="content"
    )
    for row in zip(*columns):
        assert max(a for a, _ in row) < 1.25 * min(a for a, _ in row)


@pytest.mark.parametrize("option", ["--attn-init=released", "--solver=newton"])
def test_what_landmarks_by_content_have_not_is_refused(option, run_tool):
    for more in ((), ("--variant=SOFTPlusPlus", "--landmarks=content")):
        status, _, errors = run_tool("analysis_tools/attention_scale.py", option, *more)
        message = f"{option.split('=')[0]} is of released landmarks: add --landmarks released"
        assert (status, message in errors) == (2, True), errors


def test_one_scale_with_newton_and_with_batch_statistics():
    check(SOFTPlusPlus, "tiny", 49, solver="newton", sizes=QUICK_SIZES)
    check(SOFTPlusPlus, "tiny", 49, train=True, sizes=QUICK_SIZES)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["tiny", "small", "medium", "large", "huge"])
@pytest.mark.parametrize(("variant", "max_landmarks"), CASES)
def test_every_arch_has_one_scale_at_every_resolution(variant, max_landmarks, arch):
    check(variant, arch, max_landmarks)


def test_without_normalization_nor_budget_the_attention_grows():
    """What the symmetric normalization is for: SOFT's term goes like the number of tokens."""
    columns = tool.scales_by_size(SOFT, tool.SIZES[:2], arch="tiny", max_landmarks=None)
    assert all(b / a > 3 for (a, _), (b, _) in zip(*columns))


def test_released_initialization_is_nearly_silent_and_leaves_loaded_weights_alone():
    options = dict(landmarks="released", attn_init="released")
    balanced, released = SOFTPlusPlus(landmarks="released"), SOFTPlusPlus(**options)
    norm = released.stages[0].blocks[0].attn.landmark_norm
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()
    (columns,) = tool.scales_by_size(SOFTPlusPlus, tool.SIZES[:1], **options)
    assert min(a / c for a, c in columns) < 0.05
    balanced.load_state_dict(released.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(balanced.eval()(image), released.eval()(image)):
        assert torch.equal(a, b)
