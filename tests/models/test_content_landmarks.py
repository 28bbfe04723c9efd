"""`landmarks='content'`: what the layer and the backbone make of it, and what it is good for."""

from functools import partial

import pytest
import torch
from loading import load_tool
from operators import before_torch, needs_torch_2_6
from released import ARCH
from torch import nn

from mmsoft.analysis import BlockState, attention_usage, capture
from mmsoft.models import SOFT, SOFTPlusPlus
from mmsoft.models.attention import SoftmaxFreeAttention
from mmsoft.ops import reference

OPTIONS = dict(landmarks="content", max_landmarks=16)


def layer(dims=64, heads=2, stride=4, landmarks="content", budget=16):
    torch.manual_seed(0)
    options = dict(normalize=True, max_landmarks=budget, landmarks=landmarks, solver="direct")
    attn = SoftmaxFreeAttention(dims, heads, stride, 3, **options)
    nn.init.trunc_normal_(attn.query.weight, std=0.02)
    attn.init_queries()
    return attn


def backbone(**options):
    torch.manual_seed(0)
    return SOFTPlusPlus(ARCH, **{**OPTIONS, **options})


IDLE = {"landmark_conv.weight", "landmark_norm.weight", "landmark_norm.bias"}


def test_every_parameter_has_a_gradient():
    """Which is 0 where the parameter is that of released landmarks."""
    model = backbone().train()
    sum(out.square().sum() for out in model(torch.randn(2, 3, 96, 128))).backward()
    still = {n.rpartition(".attn.")[2] for n, p in model.named_parameters() if not p.grad.any()}
    assert still == IDLE


def test_an_optimizer_built_before_released_weights_were_loaded_trains_all_of_them():
    model = backbone().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.load_state_dict(backbone(landmarks="released").state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(out.square().sum() for out in model(torch.randn(2, 3, 96, 128))).backward()
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_landmarks_are_the_definition_of_the_chosen_patches():
    attn = layer()
    q = torch.randn(2, 24 * 32, 64)
    landmarks, present, chosen_patches = attn.sample_landmarks(q, (24, 32))
    tokens = q.double().view(2, 6, 4, 8, 4, 2, 32).permute(0, 1, 3, 5, 2, 4, 6)
    patches = tokens.reshape(2, 48, 2, 16, 32)
    centre = q.double().mean(1).view(2, 2, 32)
    candidates = reference.salient_mean(patches, centre).transpose(1, 2)
    index, truth = reference.choose_landmarks(candidates, 16)
    assert torch.equal(chosen_patches, index)
    assert torch.equal(present, truth)
    chosen = candidates.gather(2, index[..., None].expand(-1, -1, -1, 32))
    torch.testing.assert_close(landmarks.double(), chosen, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_layer_are_those_of_the_definition():
    """The chosen landmarks' gradient included, the choice and the weights of a mean being fixed."""
    attn = layer().double()
    q, v = (torch.randn(2, 24 * 32, 64, dtype=torch.float64) for _ in range(2))
    q, v = q.requires_grad_(), v.requires_grad_()

    def split(t):
        return t.unflatten(2, (2, 32)).transpose(1, 2)

    tokens = q.view(2, 6, 4, 8, 4, 2, 32).permute(0, 1, 3, 5, 2, 4, 6)
    patches = tokens.reshape(2, 48, 2, 16, 32)
    centre = q.detach().mean(1).view(2, 2, 32)
    candidates = reference.salient_mean(patches, centre).transpose(1, 2)
    index, present = reference.choose_landmarks(candidates.detach(), 16)
    landmarks = candidates.gather(2, index[..., None].expand(-1, -1, -1, 32))
    truth = reference.landmark_attention(split(q), split(v), landmarks, present)
    truth = truth.transpose(1, 2).flatten(2)
    ours, weight = attn.attend(q, v, (24, 32)), torch.randn_like(truth)
    torch.testing.assert_close(ours, truth)
    grads = (torch.autograd.grad(out, (q, v), weight) for out in (ours, truth))
    for mine, expected in zip(*grads):
        torch.testing.assert_close(mine, expected)


def test_queries_start_about_one_bandwidth_apart():
    """Of unlike tokens of unit variance; with released landmarks they start much closer."""
    apart = {}
    for landmarks in ("content", "released"):
        attn = backbone(landmarks=landmarks).stages[2].blocks[0].attn
        x = torch.randn(1, 400, attn.query.in_features)
        q = attn.queries_and_values(x)[0].unflatten(2, (attn.num_heads, -1))
        apart[landmarks] = (q[:, 1:] - q[:, :-1]).square().sum(-1).mean().item()
    assert 3 < apart["content"] < 9
    assert apart["released"] < 0.5


@pytest.mark.parametrize("hw", [(3, 5), (3, 11), (9, 2)], ids=str)
def test_padding_of_an_image_smaller_than_a_patch_is_no_landmark(hw):
    """Landmarks of tokens far from 0 are among them."""
    q = torch.randn(1, hw[0] * hw[1], 64) + 3
    landmarks, present, _ = layer(stride=8).sample_landmarks(q, hw)
    assert present[..., 0].all()
    assert (landmarks[present].mean(-1) > 2).all()


@pytest.mark.parametrize("times", [2, 4])
def test_the_term_keeps_its_size_in_a_larger_image(times):
    """The same content several times over: every token gets what it got from one image."""
    attn = layer().eval()
    image = torch.randn(1, 64, 16, 16)
    outs = []
    for each in (image, image.repeat(1, 1, times, times)):
        q, v = attn.queries_and_values(each.flatten(2).mT)
        out = attn.attend(q, v, each.shape[2:])
        outs.append(out.view(1, *each.shape[2:], 64)[:, :16, :16])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch_mates():
    """In float64, where the order of a sum does not show."""
    model, x = backbone().double().eval(), torch.randn(3, 3, 160, 192).double()
    with torch.no_grad():
        for each, alone in zip(model(x), model(x[1:2])):
            torch.testing.assert_close(each[1:2], alone)


@pytest.mark.parametrize(("built", "stored"), [("content", "released"), ("released", "content")])
def test_weights_decide(built, stored):
    source, model = backbone(landmarks=stored).eval(), backbone(landmarks=built).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert not torch.equal(source(x)[2], model(x)[2])
        model.load_state_dict(source.state_dict())
        assert all(map(torch.equal, source(x), model(x)))
    assert model.state_dict().keys() == source.state_dict().keys()


def test_a_plain_state_dict_decides_too():
    """Without the metadata that torch keeps beside the tensors."""
    model = backbone(landmarks="released")
    model.load_state_dict(dict(backbone().state_dict()))
    assert model.stages[0].blocks[0].attn.by_content


def test_each_layer_follows_its_own_weights():
    source = backbone(landmarks="released").eval()
    source.stages[2].blocks[1].attn.use_landmarks("content")
    model = backbone(landmarks="content").eval()
    model.stages[2].blocks[1].attn.use_landmarks("released")
    model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert all(map(torch.equal, source(x), model(x)))


def test_defaults():
    """By content where that can be: what a config that names nothing gets."""
    attentions = [variant(ARCH).stages[1].blocks[0].attn for variant in (SOFT, SOFTPlusPlus)]
    assert [attn.by_content for attn in attentions] == [False, True]
    assert [attn.max_landmarks for attn in attentions] == [49, 49]


def test_without_normalization_is_refused():
    with pytest.raises(ValueError, match="landmarks='content' are normalized: use SOFT"):
        SOFT(ARCH, landmarks="content")


@pytest.mark.skipif(before_torch("2.9"), reason="torch 2.6 fixes the number of landmarks")
def test_exported_program_of_any_size():
    """12 patches, and 30, of which the budget keeps 16. tests/export/ has one of all stages."""
    model, x = backbone(out_indices=(0,)).eval(), torch.randn(1, 3, 96, 128)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({2: auto, 3: auto},)).module()
        for size in ((96, 128), (160, 192)):
            x = torch.randn(1, 3, *size)
            for ours, expected in zip(program(x), model(x)):
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@needs_torch_2_6
@pytest.mark.long
def test_compiled_program():
    model, x = backbone().eval(), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for ours, expected in zip(torch.compile(model, dynamic=False)(x), model(x)):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_rows_of_the_attention_are_what_the_layer_multiplies_by():
    model = backbone().double().eval()
    with capture(model) as states:
        model(torch.randn(1, 3, 96, 128).double())
    for state in states.values():
        rows = state.attention_rows([0, 5])
        q, v = (t.transpose(1, 2).flatten(2) for t in (state.q, state.v))
        out = state.layer.attend(q, v, state.hw_shape)[:, [0, 5]].unflatten(
            2, (state.v.shape[1], -1)
        )
        torch.testing.assert_close((rows @ state.v).transpose(1, 2), out)


def usage_of(model, inputs):
    """Of the only layer of a model."""
    states, attn = [], model.block.attn

    def record(_, arguments):
        x, hw_shape = arguments
        q, v = attn.queries_and_values(x)
        heads = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, v))
        states.append(BlockState(attn, hw_shape, *heads, *attn.sample_landmarks(q, hw_shape)))

    handle = attn.register_forward_pre_hook(record)
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    return attention_usage(states[0])


def test_attention_starts_alive():
    """On tokens that differ: with the weights of released queries all rows are one."""
    tasks = load_tool("analysis_tools/attention_tasks.py")
    torch.manual_seed(0)
    model = tasks.Recall(tasks.build_attention("content", 8, stride=2), 8)
    inputs, *_ = tasks.recall(16, torch.Generator().manual_seed(0), queries=8, side=8)
    usage = usage_of(model, inputs)
    assert (usage.nearest > 0.5).all()
    assert (usage.rank > 1.2).all()
    assert (usage.varying > 0.05).all()


def test_associative_recall():
    """Four pairs of key and value at random places among 64 tokens, and eight queries elsewhere."""
    tasks = load_tool("analysis_tools/attention_tasks.py")
    draw = partial(tasks.recall, queries=8, side=8)
    torch.manual_seed(0)
    model = tasks.Recall(tasks.build_attention("content", 8, stride=2), 8)
    tasks.train(model, draw, steps=400, seed=0, lr=2e-3)
    # Chance is 0.125; how far it comes depends on the seed and the steps.
    assert tasks.accuracy(model, draw) >= 0.9
    usage = usage_of(model, draw(16, torch.Generator().manual_seed(-1))[0])
    assert (usage.nearest > 0.5).all()
    assert (usage.rank > 1.5).all()
    assert (usage.varying > 0.25).all()
