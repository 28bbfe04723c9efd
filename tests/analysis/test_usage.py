"""How much attention is used, against the definitions."""

import pytest
import torch
from released import ARCH

from mmsoft.analysis import attention_usage, capture
from mmsoft.models import SOFTPlusPlus
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops import reference


@torch.no_grad()
@pytest.mark.parametrize("landmarks", ["content", "released"])
def test_usage_is_the_definition(landmarks):
    torch.manual_seed(0)
    model = SOFTPlusPlus(ARCH, landmarks=landmarks, solver="direct", max_landmarks=9).eval()
    with torch.no_grad(), capture(model) as states:
        model(torch.randn(3, 3, 96, 128))
    for state in states.values():
        usage = attention_usage(state)
        every = torch.arange(state.q.shape[2])
        for h in range(state.q.shape[1]):
            found = []
            for b in range(3):
                landmarks = state.landmarks[b, h].double()
                if state.present is not None:
                    landmarks = landmarks[state.present[b, h]]
                kernel = reference.gaussian_kernel(state.q[b, h].double(), landmarks)
                read = kernel
                if state.present is not None:  # rows sum to 1, keys weigh by their length
                    far = landmarks - state.q[b, h].double().mean(0)
                    read = kernel * far.square().sum(-1).div(2).exp()
                    read = read / read.sum(-1, keepdim=True)
                s = torch.linalg.svdvals(read)
                rows = state.attention_rows(every)[b, h]
                term = rows @ state.v[b, h].double()
                v = state.v.transpose(1, 2).flatten(2)
                convolved = state.layer.convolve_values(v, state.hw_shape)[b]
                convolved = convolved.unflatten(1, (state.q.shape[1], -1))[:, h].double()
                found.append(
                    [
                        len(landmarks),
                        kernel.max(1).values.median(),
                        s.square().sum() ** 2 / s.pow(4).sum(),
                        term.std() / convolved.std(),
                        (term - term.mean(0)).std() / term.std(),
                    ]
                )
            truth = torch.tensor(found, dtype=torch.float64).mean(0)
            columns = ("landmarks", "nearest", "rank", "ratio", "varying")
            ours = torch.stack([getattr(usage, column)[h] for column in columns])
            torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)


def test_rank_of_equal_and_of_unlike_rows():
    """All tokens alike: 1. As many distant clusters of equal size as landmarks: their number."""
    torch.manual_seed(0)
    model = SOFTPlusPlus(ARCH, landmarks="content", solver="direct").eval()
    with torch.no_grad(), capture(model, (0, 0)) as states:
        model(torch.zeros(1, 3, 64, 64))
    (state,) = states.values()
    state.q = torch.zeros_like(state.q)
    state.landmarks = torch.zeros_like(state.landmarks)
    state.present = torch.ones(state.landmarks.shape[:3], dtype=torch.bool)
    torch.testing.assert_close(attention_usage(state).rank, torch.ones(1).double())
    state.q = 9 * torch.eye(4, 32).repeat_interleave(64, 0).expand(1, 1, 256, 32)
    state.landmarks = 9 * torch.eye(4, 32)[None, None]
    state.present = torch.ones(1, 1, 4, dtype=torch.bool)
    torch.testing.assert_close(attention_usage(state).rank, torch.full((1,), 4.0).double())


def test_what_all_queries_share_does_not_make_rows_alike():
    """A long mean query, which every landmark has too."""
    model = SOFTPlusPlus(ARCH, landmarks="content").eval()
    with torch.no_grad(), capture(model, (0, 0)) as states:
        model(torch.randn(1, 3, 64, 64))
    (state,) = states.values()
    state.q = torch.randn(state.q.shape)
    state.landmarks = state.q[:, :, :5]
    state.present = torch.ones(1, 1, 5, dtype=torch.bool)
    before = attention_usage(state).rank
    assert before > 1.5
    state.q, state.landmarks = state.q + 9, state.landmarks + 9
    torch.testing.assert_close(attention_usage(state).rank, before, rtol=1e-4, atol=0)


def test_padding_does_not_count():
    """Whatever the layer made of it."""
    # Without BatchNorm it would be cut off before the layer meets it.
    model = SOFTPlusPlus(ARCH, max_landmarks=9, norm_cfg=dict(type="BN")).eval()
    image = torch.zeros(1, 3, 96, 128)
    image[:, :, :64, :96] = torch.randn(3, 64, 96)
    with torch.no_grad(), capture(model) as states:
        model(image)
    for state in states.values():
        before = attention_usage(state)
        state.q[:, :, ~state.mask[0]], state.v[:, :, ~state.mask[0]] = 3.0, -5.0
        after = attention_usage(state)
        for name in ("landmarks", "nearest", "rank", "ratio", "varying"):
            torch.testing.assert_close(getattr(before, name), getattr(after, name))


def test_an_attention_of_ones_own_is_measured():
    """One whose methods do not know of padding."""

    class Own(SoftmaxFreeAttention):
        def attend(self, q, v, hw_shape):
            return super().attend(q, v, hw_shape)

    class Backbone(SOFTPlusPlus):
        def build_attention(self, **options):
            return Own(**options)

    with torch.no_grad(), capture(model := Backbone(ARCH).eval()) as states:
        model(torch.randn(1, 3, 64, 64))
    assert all(attention_usage(state).rank.isfinite().all() for state in states.values())
