"""Backbones under autocast, in forward mode, under ``torch.func`` and without data."""

from functools import partial

import pytest
import torch
from on_device import device_type
from operators import JVPS, before_torch
from released import ARCH
from torch import nn
from torch._subclasses import FakeTensorMode

from mmsoft.models import SOFT, SOFTPlusPlus

if before_torch("2.3"):
    MATH = partial(torch.backends.cuda.sdp_kernel, enable_flash=False, enable_mem_efficient=False)
else:
    MATH = partial(torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.MATH)
OPTIONS = dict(max_landmarks=9, max_keys=9)
CASES = [
    (SOFT, dict(solver="direct")),
    (SOFTPlusPlus, dict(landmarks="released")),
    (SOFTPlusPlus, dict()),
]


def build(variant, options, **kwargs):
    model = variant(ARCH, **OPTIONS, **options, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model


def product(a, b) -> float:
    return sum((x * y).sum() for x, y in zip(a, b)).item()


@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
def test_backward_inside_autocast(variant, options, request):
    """As mixed precision is often written: the whole step inside. To the last bit as outside."""
    if request.config.getoption("device") == "pretended":
        pytest.skip("torch's fused attention, whose backward pass is one, is not taken there")
    model = build(variant, options, norm_eval=True).train()
    image, gradients = torch.randn(2, 3, 96, 128), []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast(device_type(), torch.bfloat16):
            loss = sum(out.float().square().mean() for out in model(image))
        with torch.autocast(device_type(), torch.bfloat16, enabled=inside):
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, outside in gradients[0].items():
        assert torch.equal(gradients[1][name], outside), name


@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
def test_tangents_of_an_image(variant, options, jvp, monkeypatch):
    """``<J t, w> = <t, J^T w>``; without gradients tokens are taken in turns."""
    monkeypatch.setattr("mmsoft.models.layers._Block.part_elements", 41 * ARCH["embed_dims"][0])
    model = build(variant, options).double()
    image, tangent = (torch.randn(1, 3, 96, 128).double() for _ in range(2))
    outs = model(image.requires_grad_())
    weights = [torch.randn_like(out) for out in outs]
    (gradient,) = torch.autograd.grad(outs, image, weights)
    found = product(jvp(model, (image.detach(),), (tangent,))[1], weights)
    assert found == pytest.approx(product([gradient], [tangent]), rel=1e-9)


@pytest.mark.parametrize("landmarks", ["content", "released"])
def test_derivatives_with_respect_to_parameters(landmarks):
    """``functional_call`` under ``jvp``, ``grad``, and forward over reverse."""
    model = build(SOFTPlusPlus, dict(solver="direct", landmarks=landmarks)).double()
    image = torch.randn(1, 3, 64, 96).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters):
        outs = torch.func.functional_call(model, parameters, (image,))
        return sum(out.square().mean() for out in outs)

    truth = torch.autograd.grad(
        sum(out.square().mean() for out in model(image)), list(model.parameters())
    )
    gradients, curvature = torch.func.jvp(torch.func.grad(loss), (parameters,), (tangents,))
    for name, expected in zip(parameters, truth):
        assert torch.allclose(gradients[name], expected, rtol=1e-9, atol=1e-12), name
    _, slope = torch.func.jvp(loss, (parameters,), (tangents,))
    assert slope.item() == pytest.approx(product(truth, tangents.values()), rel=1e-9)

    def slope_in_reverse(parameters):
        gradients = torch.func.grad(loss)(parameters)
        return sum((gradients[name] * tangents[name]).sum() for name in gradients)

    with MATH():  # fused attention has no second derivative
        reverse = torch.func.grad(slope_in_reverse)(parameters)
    for name, expected in reverse.items():
        assert torch.allclose(curvature[name], expected, rtol=1e-8, atol=1e-9), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
def test_tensors_without_data(variant, options, kind, train, autocast):
    """Shapes and dtypes of a large image at no cost, and of all gradients."""

    place = device_type()

    def run(function, parameters):
        with torch.autocast(place, torch.bfloat16, enabled=autocast):
            outs = function()
        assert [out.shape for out in outs] == [
            (2, c, 800 >> i, 1280 >> i) for i, c in enumerate(ARCH["embed_dims"], 2)
        ]
        if kind == "fake":
            assert {out.dtype for out in outs} == {torch.bfloat16 if autocast else torch.float32}
        if train:
            sum(out.sum() for out in outs).backward()
            assert all(p.grad.shape == p.shape for p in parameters)

    with torch.set_grad_enabled(train):
        if kind == "meta":
            with torch.device("meta"):
                with_cp = not before_torch("2.6")  # whose checkpointing does not know the device
                model = variant(ARCH, with_cp=with_cp, **OPTIONS, **options).train(train)
                run(lambda: model(torch.empty(2, 3, 800, 1280)), list(model.parameters()))
            return
        model = variant(ARCH, drop_path_rate=0.1, **OPTIONS, **options).train(train)
        with FakeTensorMode() as mode:
            tensors = (*model.named_parameters(), *model.named_buffers())
            fake = {name: mode.from_tensor(tensor) for name, tensor in tensors}
            image = torch.empty(2, 3, 800, 1280)
            run(
                lambda: torch.func.functional_call(model, fake, (image,)),
                [fake[name] for name, _ in model.named_parameters()],
            )
