"""The captured inputs are those that the layers use."""

import pytest
import torch
from metrics import error
from mini_models import LIBRARIES, build
from released import ARCH

from mmsoft.analysis import KeptRows, attention_blocks, capture, choose_block
from mmsoft.models import SOFT, SOFTPlusPlus

IMAGE = (1, 3, 96, 128)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (SOFTPlusPlus, {}),
        (SOFT, dict(solver="direct", landmark_sampling="avg")),
        (SOFTPlusPlus, dict(max_landmarks=6, newton_steps=9)),
    ],
)
def test_rows_reproduce_the_layers_attention(variant, options):
    model = variant(ARCH, **options).eval().double()
    image = torch.randn(IMAGE).double()
    with torch.no_grad(), capture(model) as states:
        model(image)
    assert list(states) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    for (stage, block), state in states.items():
        layer = model.stages[stage].blocks[block].attn
        assert state.layer is layer
        n = state.hw_shape[0] * state.hw_shape[1]
        assert state.q.shape == (1, layer.num_heads, n, layer.head_dims)
        if "max_landmarks" in options:
            assert state.landmarks.shape[2] <= 6
        queries = [0, n // 2, n - 1]
        out = state.attention_rows(queries) @ state.v
        flat = [t.transpose(1, 2).flatten(2) for t in (state.q, state.v)]
        with torch.no_grad():
            expected = layer.attend(*flat, state.hw_shape)[:, queries]
        expected = expected.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        assert error(out, expected) < 1e-7


def test_rows_read_nothing_from_padding():
    model = SOFTPlusPlus(ARCH, max_landmarks=6).eval().double()
    images = torch.randn(2, *IMAGE[1:]).double()
    images[0, :, 70:], images[1, :, :, 90:] = 0, 0
    with torch.no_grad(), capture(model) as states:
        model(images)
    for state in states.values():
        queries = [0, 5]
        rows = state.attention_rows(queries)
        out, expected = rows @ state.v, state.attend().unflatten(2, (state.q.shape[1], -1))
        assert error(out, expected.transpose(1, 2)[:, :, queries]) < 1e-7
        assert not rows.masked_select(~state.mask[:, None, None].expand_as(rows)).any()
        torch.testing.assert_close(KeptRows(state)(queries), rows)
    assert [int(n) for n in states[0, 0].mask.sum(1)] == [18 * 32, 24 * 23]


def test_a_single_block_and_no_hooks_left():
    model = SOFTPlusPlus(ARCH)
    with capture(model, only=(1, -1)) as states:
        model(torch.randn(IMAGE))
    assert list(states) == [(1, 1)]
    states.clear()
    model(torch.randn(IMAGE))
    assert not states


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_of_whole_models(library):
    model = build(library)
    assert list(attention_blocks(model)) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert choose_block(model, 1, -1) == (1, 1)


def test_missing_stages_blocks_and_attention():
    model = SOFTPlusPlus(ARCH)
    with pytest.raises(ValueError, match=r"stage 3 has no softmax-free attention.*one of 0, 1, 2"):
        choose_block(model, 3, 0)
    with pytest.raises(ValueError, match=r"stage 1 has 2 block\(s\).*got block 2"):
        choose_block(model, 1, 2)
    with pytest.raises(ValueError, match=r"Linear has no softmax-free attention.*mmsoft.SOFT"):
        attention_blocks(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (SOFTPlusPlus, {}),
        (SOFTPlusPlus, dict(solver="direct", max_landmarks=6)),
        (SOFTPlusPlus, dict(landmarks="content", max_landmarks=6)),
        (SOFT, dict(newton_steps=9)),
    ],
    ids=str,
)
def test_kept_rows_are_the_rows(monkeypatch, variant, options):
    """In float64, and in float32 where the kernel is too large for it."""
    model = variant(ARCH, **options).eval()
    with torch.no_grad(), capture(model) as states:
        model(torch.randn(IMAGE))
    for state in states.values():
        queries = [0, 5, state.q.shape[2] - 1]
        expected = state.attention_rows(queries)
        assert error(KeptRows(state)(queries), expected) < 1e-9
        with monkeypatch.context() as patch:
            patch.setattr(KeptRows, "float64_elements", 0)
            rows = KeptRows(state)
            assert rows.kernel.dtype == torch.float32
            assert error(rows(queries), expected) < 1e-4


def test_rows_of_weights_that_are_not_numbers(monkeypatch):
    """They are none either; many landmarks are decomposed, which raises on NaN."""
    monkeypatch.setattr(KeptRows, "few_landmarks", 3)
    model = SOFTPlusPlus(ARCH, landmarks="released").eval()
    with torch.no_grad():
        attention_blocks(model)[0, 0].query.weight.fill_(torch.nan)
        with capture(model) as states:
            model(torch.randn(IMAGE))
    assert KeptRows(states[0, 0])([0]).isnan().any()
