"""What a forward pass would launch on a GPU: of padding as good as nothing for each layer."""

import gc
import weakref

import pytest
import torch
from launches import launches

from mmsoft.models import SOFTPlusPlus, padding
from mmsoft.models.layers import SOFTBlock

pytestmark = pytest.mark.cpu
IMAGES = (2, 3, 128, 160)


def on_meta(depths=(1, 1, 1, 1), **options):
    arch = dict(
        embed_dims=(16, 32, 48, 64),
        num_heads=(1, 2, 3, 4),
        depths=depths,
        landmark_strides=(8, 4, 2),
        value_kernels=(5, 5, 3),
    )
    with torch.device("meta"):
        return SOFTPlusPlus(arch, **options)


def of_a_block(stage, **options):
    """Launches of one more of them in evaluation, in training and in the backward pass."""
    images = torch.empty(*IMAGES, device="meta")
    depths = [1 + (stage == i) for i in range(4)]
    more, one = (launches(on_meta(each, **options), images) for each in (depths, (1, 1, 1, 1)))
    return [a - b for a, b in zip(more, one)]


@pytest.mark.parametrize(
    ("stage", "most", "of_padding"), [(1, (38, 50, 62), 2), (3, (12, 12, 32), 0)]
)
def test_of_a_block(stage, most, of_padding):
    """Queries and values take one more each, no mask is made again: once 96, 108 and 83."""
    unpadded = of_a_block(stage, ignore_padding=False)
    assert all(map(int.__le__, unpadded, most))
    ours, backward = of_a_block(stage), 5 if of_padding else 0
    assert ours[0] - unpadded[0] <= of_padding
    assert ours[1] - unpadded[1] <= of_padding
    assert ours[2] - unpadded[2] <= backward


def test_of_a_model():
    """Of which 1102 and 343 were too many."""
    images = torch.empty(2, 3, 800, 1344, device="meta")
    found = []
    for ignore_padding in (True, False):
        with torch.device("meta"):
            model = SOFTPlusPlus("tiny", ignore_padding=ignore_padding)
        found.append(launches(model, images)[0])
    assert found[0] < 480
    assert found[1] < 290


def test_blocks_get_tokens_whose_memory_is_theirs():
    """Not the image's, which a GroupNorm leaves otherwise: each layer would copy."""
    model, seen = on_meta(ignore_padding=False), []
    for module in model.modules():
        if isinstance(module, SOFTBlock):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.empty(*IMAGES, device="meta"))
    assert [x.is_contiguous() for x in seen] == [True] * 3


@pytest.mark.parametrize("with_cp", [False, True])
def test_masks_end_with_the_program_that_made_them(with_cp, monkeypatch):
    """Without waiting for the garbage collector."""
    made = []
    init = padding.Inside.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(padding.Inside, "__init__", noted)
    model, images = on_meta(with_cp=with_cp), torch.empty(*IMAGES, device="meta")
    gc.disable()
    try:
        outs = model(images)
        assert len(made) == 6  # pixels, and every 2nd to 32nd of them
        sum(out.sum() for out in outs).backward()
        del outs
        assert [each() for each in made] == [None] * 6
    finally:
        gc.enable()
