"""Hooks, adapters and quantized layers: what they change about a module is what the model does."""

import copy
import re

import pytest
import torch
from metrics import error
from operators import Calls
from released import ARCH
from torch import nn
from torch.nn.utils import parametrize

from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.models.norms import become

OPTIONS = dict(solver="direct", max_landmarks=9, max_keys=9, landmarks="released")
ATTENTION = "stages.1.blocks.0.attn"
SHORTCUTS = [
    *(f"{ATTENTION}.{name}" for name in ("query", "value", "proj")),
    *(f"{ATTENTION}.{name}" for name in ("landmark_conv", "landmark_norm", "value_conv")),
    *(f"stages.0.patch_embed.{i}.{name}" for i in range(3) for name in ("conv", "norm")),
    *("stages.0.blocks.0.norm1", "stages.0.blocks.0.mlp", "stages.0.blocks.0.mlp.3"),
    *("stages.3.blocks.1.attn.query", "stages.3.blocks.1.attn.key_value", "stages.3.blocks.1.mlp"),
]


@pytest.fixture
def model(monkeypatch):
    """With statistics of its own, weights that matter, and tokens taken in turns if possible."""
    monkeypatch.setattr("mmsoft.models.layers._Block.part_elements", 41 * ARCH["embed_dims"][0])
    backbone = SOFTPlusPlus(ARCH, **OPTIONS)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return backbone.eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 96, 128)


@torch.no_grad()
def features(model, image):
    return [out.clone() for out in model(image)]


def flip(out):
    """Another result that no norm undoes."""
    return out.flip(-1)


def close(ours, expected, tolerance=1e-5):
    assert max(map(error, ours, expected)) <= tolerance


@pytest.mark.parametrize("train", [False, True])
def test_every_module_is_called_once(model, image, train):
    """Before and after its work, with all tokens at once; watching changes no result."""
    expected = features(model, image)
    calls = {}

    def note(name, key, batch):
        calls.setdefault(name, []).append((key, batch))

    watched = [(n, m) for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)]
    for name, module in watched:
        module.register_forward_pre_hook(
            lambda module, args, name=name: note(name, "before", args[0].shape[0])
        )
        module.register_forward_hook(lambda module, args, out, name=name: note(name, "after", None))
    if train:
        model.train()(image)
    else:
        close(features(model, image), expected)
    for name, _ in watched:  # a block has one module for its two branches
        times = 2 if name.endswith("drop_path") else 1
        assert calls[name] == [("before", 2), ("after", None)] * times, name


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_hook_changes_what_follows(model, image, name):
    expected = features(model, image)
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: flip(out))
    changed = features(model, image)
    assert max(map(error, changed, expected)) > 1e-3
    handle.remove()
    assert all(map(torch.equal, features(model, image), expected))


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_backward_hook_sees_the_gradient(model, image, name, kind):
    seen = []
    register = getattr(model.get_submodule(name), f"register_{kind}")
    register(lambda module, *grads: seen.append(float(grads[-1][0].norm())))
    sum(out.square().mean() for out in model(image.requires_grad_())).backward()
    assert len(seen) == 1
    assert seen[0] > 0


def test_what_a_hook_keeps_stays(model, image):
    """Nothing that follows writes to it, ReLUs and sums in place included."""
    kept = {}

    def keep(name, out):
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        kept[name] = tensors, [t.clone() for t in tensors]

    for name, module in model.named_modules():
        if not isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out, name=name: keep(name, out))
    features(model, image)
    assert set(SHORTCUTS) <= set(kept)
    for name, (later, then) in kept.items():
        assert all(map(torch.equal, later, then)), name


def test_a_hook_for_all_modules(model, image):
    expected, seen = features(model, image), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    try:
        close(features(model, image), expected)
    finally:
        handle.remove()
    assert {model.get_submodule(name) for name in SHORTCUTS} <= set(seen)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_module_may_be_replaced(model, image, name):
    """By one with another forward: on the instance as accelerators do it, or a module around it."""
    expected = features(model, image)
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args: flip(forward(*args))
    patched = features(model, image)
    del module.forward
    parent, _, attribute = name.rpartition(".")

    class Flipped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return flip(self.inner(*args))

    setattr(model.get_submodule(parent), attribute, Flipped(module))
    close(features(model, image), patched)
    assert max(map(error, patched, expected)) > 1e-3


@pytest.mark.parametrize("name", [name for name in SHORTCUTS if not name.endswith("mlp")])
def test_parametrized_weights(model, image, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    doubled = copy.deepcopy(model)
    doubled.get_submodule(name).weight.data *= 2
    module = model.get_submodule(name)
    parametrize.register_parametrization(module, "weight", Double())
    close(features(model, image), features(doubled, image))
    sum(out.square().mean() for out in model(image)).backward()
    assert module.parametrizations.weight.original.grad.any()


def test_plain_modules_take_the_short_way(model, image):
    """No pass over the image for a frozen norm, and none over the queries for their scale."""
    attention, conv = model.get_submodule(ATTENTION), model.stages[0].patch_embed[1]
    become(conv.norm, of_batch=True)
    conv.eval()
    tokens, pixels = torch.randn(2, 12, 64), torch.randn(2, 32, 40, 40)
    for module, call, another_pass in (
        (attention.query, lambda: attention.queries_and_values(tokens), "mul"),
        (conv.norm, lambda: conv(pixels), ".*batch_norm.*"),
    ):
        for hooked in (False, True):
            if hooked:
                module.register_forward_hook(lambda module, args, out: None)
            with Calls() as calls, torch.no_grad():
                call()
            found = any(re.fullmatch(another_pass, name) for name in calls.names)
            assert found == hooked


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization(model, image):
    """Linear layers in 8 bits: all of them, and the result is near that of 32."""
    expected = features(model, image)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    for ours, truth in zip(features(quantized, image), expected):
        assert 1e-5 < error(ours, truth) < 0.1


@pytest.mark.parametrize("variant", [SOFT, SOFTPlusPlus])
def test_low_rank_adapters_train(variant, image):
    loralib = pytest.importorskip("loralib")
    model = variant(ARCH, norm_eval=True, **OPTIONS)
    plain = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, SoftmaxFreeAttention):
            for name in ("query", "value", "proj"):
                old = getattr(layer, name)
                new = loralib.Linear(old.in_features, old.out_features, r=4)
                new.load_state_dict(old.state_dict(), strict=False)
                setattr(layer, name, new)
    loralib.mark_only_lora_as_trainable(model)
    close(features(model.train(), image), features(plain, image))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 * 3 * 2  # 5 blocks, 3 layers, 2 factors
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = [torch.randn_like(out) for out in features(plain, image)]
    optimizer = torch.optim.Adam(trained.values(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = sum((out - t).square().mean() for out, t in zip(model(image), target))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) > 1:  # the first step finds one of the factors at 0
            assert all(p.grad.any() for p in trained.values())
        optimizer.step()
    assert losses[-1] < 0.99 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    unmerged = features(model, image)
    assert max(map(error, unmerged, features(plain, image))) > 0.01
    close(features(model.eval(), image), unmerged, 1e-4)  # which merges the factors into the weight
