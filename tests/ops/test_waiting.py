"""Plain torch inside the custom operators asks for no value, for which a GPU would have to wait.

The meta device has none. What a GPU says, tests/models/test_gpu.py asks.
"""

import pytest
import torch
from waiting import NoTransfers

from mmsoft.ops.gaussian import eager as gaussian
from mmsoft.ops.inverse import eager as inverse
from mmsoft.ops.landmarks import choice
from mmsoft.ops.landmarks import eager as landmarks

X, Y, W, A = (2, 3, 70, 8), (2, 3, 5, 8), (2, 3, 5, 4), (2, 3, 5, 5)
ONE, GRAD = (2, 1, 1, 1), (2, 3, 70, 4)


def masked_choice(candidates):
    return choice.choose(candidates, 6, 0.1, torch.empty(2, 70, dtype=torch.bool, device="meta"))


def by_index(q, patches):
    index = torch.empty(2, 3, 5, dtype=torch.int64, device="meta")
    out = landmarks.gather(q, 10, 7, 3, 2, None, index)
    return out, landmarks.scatter(patches, 10, 7, 2, None, index)


CALLS = {
    "product": (lambda *t: gaussian.product(*t, False), (X, Y, W, ONE)),
    "divided": (lambda *t: gaussian.product(*t, True), (Y, X, GRAD, ONE)),
    "backward": (
        lambda *t: gaussian.product_backward(*t, False, (True,) * 3), (GRAD, X, Y, W, ONE)),
    "newton": (lambda a: inverse.newton(a, None, None, 3), (A,)),
    "solve": (inverse.solve, (A, ONE, W)),
    "choice": (lambda x: choice.choose(x, 6, 0.1), (X,)),
    "choice of many": (lambda x: choice.choose(x, 6, 0.1), ((2, 3, 200, 8),)),
    "masked choice": (masked_choice, (X,)),
    "even patches": (lambda q: landmarks.gather(q, 10, 7, 3, 2, 4), ((2, 70, 24),)),
    "scattered": (lambda g: landmarks.scatter(g, 10, 7, 2, 4), ((2, 4, 3, 4, 8),)),
    "patches by index": (by_index, ((2, 70, 24), (2, 5, 3, 4, 8))),
}  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_no_value_is_asked_for(name):
    function, shapes = CALLS[name]
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with NoTransfers():
        function(*tensors)


@pytest.mark.cpu
def test_what_asks_is_found():
    x = torch.ones(3, device="meta")
    for ask in (lambda: float(x.sum()), lambda: x[x > 0], lambda: bool((x > 0).any())):
        with NoTransfers(), pytest.raises((RuntimeError, NotImplementedError)):
            ask()
    with NoTransfers(), pytest.raises(RuntimeError, match="from cpu to meta"):
        torch.ones(3, device="cpu").to("meta")
    with NoTransfers(), pytest.raises(RuntimeError, match="from cpu to meta"):
        x.copy_(torch.ones(3, device="cpu"))
