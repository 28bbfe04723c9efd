"""Rows of the attention matrices against the whole matrices, at small sizes."""

import sys

import pytest
import torch

from mmsoft.analysis import (
    attention_rows,
    nystromformer_rows,
    performer_rows,
    rows_inside,
    softmax_rows,
)
from mmsoft.ops import reference

QUERIES = (0, 17, 34, 17)


@pytest.fixture
def q():
    return torch.randn(2, 3, 35, 8, dtype=torch.float64) * 0.8


@pytest.fixture
def landmarks(q):
    return q[:, :, ::5] + 0.3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_rows_are_those_of_the_reference(q, landmarks, normalize, solver):
    rows = attention_rows(q, landmarks, QUERIES, normalize=normalize, solver=solver, steps=13)
    matrix = reference.attention_matrix(q, landmarks, normalize=normalize, solver=solver, steps=13)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, matrix[:, :, QUERIES], rtol=1e-7, atol=1e-10)


def test_other_dtypes_are_computed_in_float64(q, landmarks):
    half, points = q.bfloat16(), landmarks.float()
    rows = attention_rows(half, points, QUERIES)
    expected = attention_rows(half.double(), points.double(), QUERIES)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_softmax_rows(q):
    rows = softmax_rows(q, QUERIES)
    torch.testing.assert_close(rows, (q @ q.mT).softmax(-1)[:, :, QUERIES])
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))


def test_performer_rows(q):
    pytest.importorskip("performer_pytorch", reason="needs mmsoft[peers]")
    from performer_pytorch.performer_pytorch import FastAttention

    q = q * 0.5
    before = torch.random.get_rng_state()
    rows = performer_rows(q, QUERIES, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    assert (rows >= 0).all()
    # The package's own layer on the identity gives the matrix.
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = FastAttention(dim_heads=8).double()
    n = q.shape[2]
    eye = torch.eye(n, dtype=q.dtype).expand(2, 3, n, n)
    x = q * 8**0.25  # it scales by itself
    torch.testing.assert_close(rows, layer(x, x, eye)[:, :, QUERIES], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(rows, performer_rows(q, QUERIES, seed=4))


@pytest.mark.parametrize("num_landmarks", [5, 7, 35])
def test_nystromformer_rows(q, num_landmarks):
    """By definition: three softmax matrices, with means over consecutive tokens as landmarks."""
    package = pytest.importorskip("nystrom_attention", reason="needs mmsoft[peers]")
    rows = nystromformer_rows(q, QUERIES, num_landmarks)
    points = q.unflatten(2, (num_landmarks, -1)).mean(3)
    pairs = ((q, points), (points, points), (points, q))
    first, middle, last = ((a @ b.mT).softmax(-1) for a, b in pairs)
    pinv = package.nystrom_attention.moore_penrose_iter_pinv(middle, 6)
    torch.testing.assert_close(rows, (first @ pinv @ last)[:, :, QUERIES], rtol=1e-6, atol=1e-8)


def test_nystromformer_rows_where_tokens_are_padded(q, monkeypatch):
    """35 tokens and 8 landmarks: against the whole matrix that the layer itself returns."""
    package = pytest.importorskip("nystrom_attention", reason="needs mmsoft[peers]")
    seen = []

    class Spy(package.NystromAttention):
        def forward(self, x, mask, **kwargs):
            if not seen:
                seen.append(super().forward(x, mask=mask, return_attn=True)[1])
            return super().forward(x, mask=mask, **kwargs)

    monkeypatch.setattr(package, "NystromAttention", Spy)
    rows = nystromformer_rows(q, QUERIES, 8)
    assert seen[0].shape[-2:] == (40, 40)
    # The five tokens of padding are a landmark by themselves, whose row is uniform: what goes to
    # them is lost, because their values are 0, and is not a part of these rows.
    assert (seen[0][..., :5] != 0).any()
    torch.testing.assert_close(rows, seen[0][:, :, 5:, 5:][:, :, QUERIES])


@pytest.mark.parametrize(
    ("queries", "message"),
    [([35], r"token numbers in \[0, 35\), got 35"), ([-1], "got -1"), ([], "at least one token")],
)
def test_queries_out_of_range(q, landmarks, queries, message):
    for call in (
        lambda: attention_rows(q, landmarks, queries),
        lambda: softmax_rows(q, queries),
        lambda: performer_rows(q, queries),
        lambda: nystromformer_rows(q, queries, 5),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_invalid_shapes_and_landmarks(q):
    with pytest.raises(ValueError, match=r"q must be \[B, heads, N, d\]"):
        softmax_rows(q[0], [0])
    with pytest.raises(ValueError, match=r"num_landmarks must be in \[1, 35\], got 36"):
        nystromformer_rows(q, [0], 36)


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lambda q: performer_rows(q, [0]), "performer_pytorch"),
        (lambda q: nystromformer_rows(q, [0], 5), "nystrom_attention"),
    ],
)
def test_a_missing_package_is_one_line(q, monkeypatch, call, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^{package} is missing: pip install 'mmsoft\[peers\]'$"
    with pytest.raises(ImportError, match=message):
        call(q)


def test_rows_of_other_methods_on_what_is_not_padding():
    q = torch.randn(2, 3, 20, 4)
    mask = torch.arange(20) % 5 < torch.tensor([[4], [3]])
    rows = rows_inside(softmax_rows, q, [0, 6], mask)
    assert not rows.masked_select(~mask[:, None, None].expand_as(rows)).any()
    for b in range(2):
        alone = softmax_rows(q[b : b + 1, :, mask[b]], [0, 5 if b == 0 else 4])
        torch.testing.assert_close(rows[b][..., mask[b]], alone[0])
    torch.testing.assert_close(rows_inside(softmax_rows, q, [3], None), softmax_rows(q, [3]))
    with pytest.raises(ValueError, match="a query is padding"):
        rows_inside(softmax_rows, q, [4], mask)
