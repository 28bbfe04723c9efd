"""Property-based tests of the public API: it works, or raises a clear error.

Clear is a TypeError or ValueError raised by our own code whose message begins with the argument's
name. `make test` tries a few examples, the same every time; `make fuzz` tries new ones for ten
minutes.
"""

import re
import time
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmsoft
from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.backbones.arch import resolve_arch
from mmsoft.ops import landmark_patches, softmax_free_attention

PACKAGE = str(Path(mmsoft.__file__).parent)
FUZZ = settings.get_current_profile_name() == "fuzz"
SECONDS = 600 / 5  # for each of the properties below

examples: list[int] = []  # those tried
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 40),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


def clear(call, *names):
    """The result of `call`; None if it refuses clearly, with one of `names` as the first words."""
    examples.append(1)
    torch.manual_seed(0)
    try:
        return call()
    except (TypeError, ValueError) as error:
        refusal = error
    frame = traceback.extract_tb(refusal.__traceback__)[-1]
    assert frame.filename.startswith(PACKAGE), f"raised in {frame.filename}: {refusal}"
    assert re.match(rf"({'|'.join(names)})\b", str(refusal)), f"names none of {names}: {refusal}"
    return None


@pytest.mark.parametrize(
    "message", ["required: a tensor", "steps of v", "v8 must be", "a q must be"]
)
def test_a_message_with_the_letter_in_it_is_not_clear(message, monkeypatch):
    def refuse(words):
        raise ValueError(words)

    monkeypatch.setitem(globals(), "PACKAGE", __file__)
    assert clear(lambda: refuse("v must be a tensor"), "q", "v") is None
    with pytest.raises(AssertionError, match="names none of"):
        clear(lambda: refuse(message), "q", "v")


def fuzz(*strategies):
    """`given`, which in `make fuzz` goes on until the time is up."""

    def decorate(function):
        profile = settings.get_profile("fuzz" if FUZZ else "quick")
        checks = settings(profile, deadline=None, suppress_health_check=list(HealthCheck))

        def test(capsys):
            examples.clear()
            end = time.monotonic() + (SECONDS if FUZZ else 0)
            while True:
                checks(given(*strategies)(function))()
                if time.monotonic() >= end:
                    break
                with capsys.disabled():
                    print(f"\r{function.__name__}: {len(examples)} examples ", end="", flush=True)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


# ------------------------------------------------------------------------------------- backbones

heads = st.integers(1, 3)
plausible = st.fixed_dictionaries(
    dict(
        num_heads=st.tuples(heads, heads, heads, heads).map(list),
        depths=st.lists(st.integers(1, 2), min_size=4, max_size=4),
        dims=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    ),
    optional=dict(
        landmark_strides=st.lists(st.integers(1, 9), min_size=3, max_size=3),
        value_kernels=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    ),
).map(
    lambda arch: {
        **{k: v for k, v in arch.items() if k != "dims"},
        "embed_dims": [d * h for d, h in zip(arch["dims"], arch["num_heads"])],
    }
)
KEYS = ["num_heads", "depths", "embed_dims", "landmark_strides", "value_kernels"]


@st.composite
def archs(draw):
    arch = draw(st.one_of(plausible, plausible, junk))
    if isinstance(arch, dict) and draw(st.booleans()):
        arch[draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=5), st.integers()))] = draw(
            st.one_of(junk, st.lists(st.integers(-1, 5), min_size=2, max_size=5))
        )
    return arch


@fuzz(archs())
def test_arch(arch):
    resolved = clear(lambda: resolve_arch(arch), "arch")
    if resolved and max(map(max, resolved.values())) <= 64:
        outs = SOFTPlusPlus(arch).eval()(torch.rand(1, 3, 40, 33))
        assert [out.shape[1] for out in outs] == resolved["embed_dims"]


VALID = dict(
    img_size=st.one_of(st.integers(1, 99), st.tuples(st.integers(1, 99), st.integers(1, 99))),
    in_channels=st.integers(1, 5),
    out_indices=st.one_of(st.integers(-4, 3), st.lists(st.integers(-4, 3), max_size=4)),
    out_type=st.sampled_from(["featmap", "cls_token"]),
    max_landmarks=st.one_of(st.none(), st.integers(1, 60)),
    solver=st.sampled_from(["newton", "direct"]),
    newton_steps=st.integers(1, 25),
    landmark_sampling=st.sampled_from(["conv", "avg"]),
    attn_init=st.sampled_from(["balanced", "released"]),
    drop_rate=st.floats(0, 0.99),
    drop_path_rate=st.floats(0, 0.99),
    frozen_stages=st.integers(-1, 4),
    norm_eval=st.booleans(),
    norm_cfg=st.sampled_from(
        [None, {"type": "BN"}, {"type": "GN", "num_groups": 4}, {"type": "GN", "num_groups": 5},
         {"type": "LN"}, {"type": "SyncBN"}, {"type": "Nonsense"}]
    ),
    with_cp=st.booleans(),
    init_cfg=st.none(),
)  # fmt: skip
SMALL = dict(embed_dims=[8, 8, 12, 16], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])


@st.composite
def options(draw):
    names = draw(st.lists(st.sampled_from(sorted(VALID)), unique=True, max_size=5))
    return {name: draw(VALID[name] if draw(st.integers(0, 3)) else junk) for name in names}


@fuzz(st.sampled_from([SOFT, SOFTPlusPlus]), options(), st.integers(1, 70), st.integers(1, 70))
def test_options(backbone, options, height, width):
    if type(steps := options.get("newton_steps")) is int and steps > 100:
        return  # correct, but long
    if type(channels := options.get("in_channels")) is int and channels > 100:
        return
    model = clear(lambda: backbone(SMALL, **options), *options)
    if model is not None:
        x = torch.rand(2, options.get("in_channels", 3), height, width)
        outs = model.eval()(x)
        assert len(outs) == len(model.out_indices)
        assert all(out.isfinite().all() for out in outs)


small_model = cache(lambda: SOFTPlusPlus(SMALL, max_landmarks=9).eval())  # on the test's device
dtypes = st.sampled_from(
    [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
     torch.uint8, torch.bool, torch.complex64]
)  # fmt: skip


@st.composite
def tensors(draw, shape=None, dtype=None, scales=4):
    if shape is None:
        shape = draw(st.lists(st.integers(0, 9), max_size=6))
    values = torch.rand(shape) * draw(st.sampled_from([1, 1e-20, 1e4, 1e20][:scales]))
    return values.to(draw(dtypes) if dtype is None else dtype)


@st.composite
def images(draw):
    if draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(tensors(), junk))
    size = st.one_of(st.integers(0, 3), st.integers(1, 130))
    shape = (draw(st.integers(0, 2)), draw(st.sampled_from([3, 3, 3, 1])), draw(size), draw(size))
    return draw(tensors(shape, scales=3))


@fuzz(images())
def test_images(x):
    outs = clear(lambda: small_model()(x), "x must")
    if outs is not None:
        sizes = [(-(-x.shape[2] // s), -(-x.shape[3] // s)) for s in (4, 8, 16, 32)]
        assert [tuple(out.shape[2:]) for out in outs] == sizes
        assert all(out.isfinite().all() for out in outs)


# ------------------------------------------------------------------------------------- operators


@st.composite
def operands(draw):
    b, h, n, m, d, dv = (draw(st.integers(low, 6)) for low in (0, 0, 0, 0, 0, 0))
    dtype = draw(dtypes)
    shapes = dict(q=[b, h, n, d], v=[b, h, n, dv], landmarks=[b, h, m, d])
    arguments = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    if draw(st.booleans()):  # one of them invalid
        arguments[draw(st.sampled_from(sorted(shapes)))] = draw(st.one_of(tensors(), junk))
    if draw(st.booleans()):
        arguments["solver"] = draw(st.one_of(st.sampled_from(["newton", "direct"]), junk))
    if draw(st.booleans()):
        arguments["steps"] = draw(st.one_of(st.integers(1, 25), junk))
    return arguments


@fuzz(operands(), st.booleans())
def test_operator(arguments, normalize):
    if type(steps := arguments.get("steps")) is int and steps > 100:
        return
    out = clear(
        lambda: softmax_free_attention(**arguments, normalize=normalize),
        *("q", "v", "landmarks", "solver", "steps"),
    )
    if out is not None:
        assert out.shape == arguments["v"].shape
        assert out.dtype == arguments["v"].dtype
        if all(arguments[name].isfinite().all() for name in ("q", "v", "landmarks")):
            assert out.isfinite().all()


counts = st.one_of(st.integers(1, 9), st.integers(1, 9), junk)


@fuzz(
    st.one_of(tensors(), tensors((2, 12, 6)), tensors((1, 35, 12), torch.float32), junk),
    st.one_of(st.sampled_from([(3, 4), (5, 7), (12, 1), [4, 3]]), junk),
    counts,
    counts,
    st.one_of(st.none(), counts),
)
def test_landmark_patches(q, hw_shape, num_heads, stride, budget):
    for value in (num_heads, stride, budget):
        if type(value) is int and value > 100:
            return
    names = ("q must", "hw_shape", "num_heads", "stride", "max_landmarks")
    out = clear(lambda: landmark_patches(q, hw_shape, num_heads, stride, budget), *names)
    if out is not None:
        assert out.shape[0] == q.shape[0]
        assert out.shape[2:] == (num_heads, stride**2, q.shape[2] // num_heads)
        assert budget is None or 1 <= out.shape[1] <= budget
