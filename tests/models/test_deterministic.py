"""Deterministic mode, as ``randomness=dict(deterministic=True)`` sets it: what torch refuses in it.

torch refuses on a GPU. Elsewhere the operators that a training step runs, those inside our own
included, are compared with torch's list of those that it refuses.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from released import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from mmsoft.models import SOFT, SequenceSOFT, SequenceSOFTPlusPlus, SOFTPlusPlus
from mmsoft.models.attention import averages
from mmsoft.ops.backends import EAGER, OPERATIONS

# By their names in the documentation of torch.use_deterministic_algorithms, of any version.
REFUSED = {
    "AvgPool3d": ["avg_pool3d_backward"],
    "AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "MaxPool3d": ["max_pool3d_with_indices_backward"],
    "FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "MaxUnpool1d": ["max_unpool2d"],
    "MaxUnpool2d": ["max_unpool2d"],
    "MaxUnpool3d": ["max_unpool3d"],
    "interpolate": [
        f"upsample_{mode}_backward"
        for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ],
    **{f"ReflectionPad{n}d": [f"reflection_pad{n}d_backward"] for n in (1, 2, 3)},
    **{f"ReplicationPad{n}d": [f"replication_pad{n}d_backward"] for n in (1, 2, 3)},
    "NLLLoss": ["nll_loss2d_forward", "nll_loss2d_backward"],
    "CTCLoss": ["_ctc_loss_backward"],
    "EmbeddingBag": ["_embedding_bag_backward", "_embedding_bag_dense_backward"],
    "put_": ["put_", "put"],
    "histc": ["histc"],
    "bincount": ["bincount"],
    "kthvalue": ["kthvalue"],
    "median": ["median.dim", "nanmedian.dim"],
    "grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "cumsum": ["cumsum"],  # of floating point
    "scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "resize_": ["resize_"],
}
NAMES = {name for names in REFUSED.values() for name in names}


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Refused(TorchDispatchMode):
    """What runs of that list, also inside our own operators, and how many operators run."""

    def __init__(self):
        super().__init__()
        self.found, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, self.count = kwargs or {}, self.count + 1
        if func.namespace == "aten":
            name = func.name().removeprefix("aten::")
            if name in NAMES or name.partition(".")[0] in NAMES:
                integers = name == "cumsum" and not args[0].is_floating_point()
                self.found |= set() if integers else {name}
        elif (operation := OPERATIONS.get(func.name().removeprefix("mmsoft::"))) is not None:
            (eager,) = (way.run for way in operation.implementations if way.name == EAGER)
            defaults = [argument.default_value for argument in func._schema.arguments]
            with self:
                eager(*args, *defaults[len(args) :])
        return func(*args, **kwargs)


IMAGES = {
    "content": dict(),
    "newton": dict(landmarks="released"),
    "direct": dict(landmarks="released", solver="direct"),
    "few landmarks": dict(landmarks="released", max_landmarks=5),
    "averages": dict(landmarks="released", landmark_sampling="avg"),
    "few keys": dict(max_keys=4),
    "no padding": dict(ignore_padding=False),
    "few keys, no padding": dict(max_keys=4, ignore_padding=False),
    "BatchNorm": dict(norm_cfg=dict(type="BN")),
    "checkpointing": dict(with_cp=True),
    "class token": dict(out_type="cls_token", out_indices=(3,)),
    "SOFT": dict(kind=SOFT, landmarks="released"),
}
SEQUENCES = {
    "SOFT": dict(kind=SequenceSOFT),
    "SOFT++": dict(),
    "direct": dict(solver="direct", landmarks="released"),
    "content": dict(landmarks="content", landmark_stride=3),
    "convolution": dict(value_kernel=5, out_type="cls_token"),
    "softmax": dict(attention="softmax"),
    "gaussian": dict(attention="gaussian"),
}


def image_backbone(kind=SOFTPlusPlus, **options):
    return kind(SMALL, drop_rate=0.1, drop_path_rate=0.1, **options).train()


def sequence_backbone(kind=SequenceSOFTPlusPlus, **options):
    arch = dict(embed_dims=16, depth=2, num_heads=2, hidden_dims=24)
    return kind(arch, vocab_size=9, max_length=50, max_landmarks=10, **options).train()


def train(model, x):
    out = model(x)
    sum(each.square().mean() for each in (out if isinstance(out, tuple) else (out,))).backward()


def test_the_list_is_that_of_torch():
    listed = torch.use_deterministic_algorithms.__doc__.rpartition("will throw a\n")[2]
    listed = listed.partition("In addition")[0]
    names = re.findall(r"^ *\* :\w+:`torch\.([\w.]+)`", listed, re.MULTILINE)
    assert len(names) > 10
    assert {name.rpartition(".")[2] for name in names} <= REFUSED.keys()


def test_what_is_refused_is_found():
    x = torch.empty(2, 3, 9, 9, device="meta", requires_grad=True)
    with Refused() as refused:
        F.adaptive_avg_pool2d(x, (4, 4)).sum().backward()
        x.cumsum(1)
        torch.empty(3, dtype=torch.bool, device="meta").cumsum(0)
    assert refused.found == {"_adaptive_avg_pool2d_backward", "cumsum"}


@pytest.mark.cpu
@pytest.mark.parametrize("name", IMAGES)
def test_images_are_trained_without_what_torch_refuses(name):
    with torch.device("meta"):  # with it, torch takes the ways that it takes on a GPU
        model, x = image_backbone(**IMAGES[name]), torch.empty(2, 3, 96, 128)
    with Refused() as refused:
        train(model, x)
    assert refused.count > 500
    assert not refused.found


@pytest.mark.cpu
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_trained_without_what_torch_refuses(name):
    with torch.device("meta"):
        model = sequence_backbone(**SEQUENCES[name])
        x = torch.empty(3, 40, dtype=torch.int64)
    with Refused() as refused:
        train(model, x)
    assert refused.count > 50
    assert not refused.found


@pytest.mark.parametrize("sizes", [(9, 13, 4, 5), (8, 8, 4, 4), (7, 5, 7, 1), (45, 61, 44, 45)])
def test_means_as_products(sizes):
    """What adaptive_avg_pool2d becomes on a GPU in this mode."""
    height, width, *parts = sizes
    x = torch.randn(2, 3, height, width, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(averages(x, *parts), F.adaptive_avg_pool2d(x, parts))


@pytest.mark.parametrize("name", ["content", "newton", "direct", "few keys", "BatchNorm"])
def test_a_step_gives_the_same_bits_again(name):
    """Two of each, from the same weights and random numbers. On a GPU torch refuses, too."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = image_backbone(**IMAGES[name])
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        x = torch.randn(2, 3, 96, 128)
        x[1, :, 70:] = 0
        for _ in range(2):
            optimizer.zero_grad()
            train(model, x)
            optimizer.step()
        found.append(list(model.parameters()))
    assert all(map(torch.equal, *found))
