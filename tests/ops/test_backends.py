"""Which implementation of an operation runs, with a second one beside plain torch."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from metrics import same
from on_device import device_type
from operators import needs_torch_2_6
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from mmsoft.ops import (
    choose_landmarks,
    landmark_patches,
    launch,
    softmax_free_attention,
    use_backend,
)
from mmsoft.ops.backends import EAGER, OPERATIONS, Implementation
from mmsoft.ops.gaussian.eager import BLOCK_ELEMENTS

OPERATORS = [name for name in OPERATIONS if hasattr(torch.ops.mmsoft, name)]


class Fake:
    """Plain torch under another name, in front of it: what ran, and what it refuses, and why."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.refused: dict[str, str] = {}

    def of(self, name: str) -> Implementation:
        eager = OPERATIONS[name].implementations[-1]

        def run(*args):
            self.ran.append(name)
            return eager.run(*args)

        def refusal(*args):
            assert any(isinstance(arg, Tensor) for arg in args)
            return self.refused.get(name)

        return Implementation("fake", run, refusal)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    for name in OPERATORS:
        implementations = [fake.of(name), OPERATIONS[name].implementations[-1]]
        monkeypatch.setattr(OPERATIONS[name], "implementations", implementations)
    return fake


def arguments() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 8, generator=g).requires_grad_() for n in (30, 30, 4)]


def both_passes(function=softmax_free_attention, **kwargs) -> list[Tensor]:
    tensors = arguments()
    out = function(*tensors, **kwargs)
    return [out.detach(), *torch.autograd.grad(out.sum(), tensors)]


def test_every_custom_operator_but_the_product_of_matrices_can_choose():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("mmsoft::") for name in names if name.startswith("mmsoft::")}
    assert ours - {"matmul"} == set(OPERATORS)
    for name in OPERATORS:
        assert OPERATIONS[name].implementations[-1].name == EAGER


def test_the_first_runs_in_both_passes(fake):
    for solver in ("newton", "direct"):
        both_passes(solver=solver)
    q = torch.randn(1, 24, 4, requires_grad=True)
    patches = landmark_patches(q, (4, 6), 2, 2, 5)
    patches.sum().backward()
    choose_landmarks(patches.transpose(1, 2).flatten(3), 3)
    assert set(fake.ran) == set(OPERATORS)


@pytest.mark.parametrize("refused", ["gaussian_kernel_product", "gaussian_kernel_product_backward"])
def test_one_that_refuses_is_passed_over_and_raises_if_asked_for(fake, refused):
    expected = both_passes()
    fake.ran.clear()
    fake.refused[refused] = "heads must be few"
    assert same(both_passes(), expected)
    assert refused not in fake.ran
    assert len(set(fake.ran)) == 3  # of both products and Newton-Raphson, forward and backward
    with use_backend("fake"), pytest.raises(RuntimeError, match=f"{refused} .* heads must be few"):
        both_passes()
    with use_backend("fake", "newton_raphson_pinv"):
        assert same(both_passes(), expected)


@pytest.mark.parametrize("shy", [False, True])
def test_one_that_is_preferred_runs_where_it_does_not_refuse(fake, monkeypatch, shy):
    """In both passes, and until the context ends; plain torch elsewhere."""
    expected = both_passes()
    for name in OPERATORS if shy else ():
        ways = OPERATIONS[name].implementations
        monkeypatch.setattr(
            OPERATIONS[name], "implementations", [replace(ways[0], on_request=True), ways[1]]
        )
    fake.refused["newton_raphson_pinv"] = "matrices must be few"
    with use_backend(EAGER):
        with use_backend("fake", strict=False):
            fake.ran.clear()
            assert same(both_passes(), expected)
            willing = {"gaussian_kernel_product", "gaussian_kernel_product_backward"}
            willing.add("newton_raphson_pinv_backward")
            assert set(fake.ran) == willing
            with use_backend("fake", "newton_raphson_pinv"), pytest.raises(RuntimeError):
                both_passes()
            fake.ran.clear()
            assert same(both_passes(), expected)
            assert set(fake.ran) == willing
        fake.ran.clear()
        both_passes()
        assert not fake.ran
    with use_backend("fake"), pytest.raises(RuntimeError, match="matrices must be few"):
        both_passes()


def test_nobody_left_names_every_reason(fake, monkeypatch):
    operation = OPERATIONS["tikhonov_solve"]
    never = Implementation(EAGER, operation.implementations[-1].run, lambda *args: "too late")
    monkeypatch.setattr(operation, "implementations", [operation.implementations[0], never])
    fake.refused["tikhonov_solve"] = "too early"
    with pytest.raises(RuntimeError, match="fake: too early; eager: too late"):
        both_passes(solver="direct")


def test_on_request_runs_where_it_is_asked_for_alone(fake, monkeypatch):
    operation = OPERATIONS["newton_raphson_pinv"]
    shy = replace(operation.implementations[0], on_request=True)
    monkeypatch.setattr(operation, "implementations", [shy, operation.implementations[1]])
    both_passes()
    assert "newton_raphson_pinv" not in fake.ran
    with use_backend("fake"):
        both_passes()
    assert "newton_raphson_pinv" in fake.ran


def test_asked_for_holds_inside_alone_and_after_an_exception(fake):
    with use_backend(EAGER):
        with use_backend("fake", "newton_raphson_pinv"):
            both_passes()
            assert set(fake.ran) == {"newton_raphson_pinv"}
        fake.ran.clear()
        both_passes()
        assert not fake.ran
        with pytest.raises(ZeroDivisionError), use_backend("fake"):
            raise ZeroDivisionError
        both_passes()
        assert not fake.ran
    both_passes()
    assert fake.ran
    assert all(operation.asked is None for operation in OPERATIONS.values())


def test_what_counts_for_a_backward_pass_is_when_it_runs(fake):
    """In another thread too, as on a GPU."""
    out = softmax_free_attention(*arguments())
    fake.ran.clear()
    with use_backend(EAGER):
        thread = threading.Thread(target=out.sum().backward)
        thread.start()
        thread.join()
    assert not fake.ran


def test_unknown_names_list_the_known(fake):
    with pytest.raises(ValueError, match=r"'tikhonov_solve': \('fake', 'eager'\).* got 'magic'"):
        use_backend("magic").__enter__()
    with pytest.raises(ValueError, match=r"\{'gaussian_kernel_pair': \('stored', 'streamed'\)\}"):
        use_backend(EAGER, "gaussian_kernel_pair").__enter__()
    with pytest.raises(ValueError, match=r"one of \(.*'tikhonov_solve'.*\), got 'solve'"):
        use_backend(EAGER, "solve").__enter__()


@needs_torch_2_6
@pytest.mark.parametrize("solver", ["newton", "direct"])
def test_a_compiled_program_chooses_anew_at_each_call(fake, solver):
    expected = both_passes(solver=solver)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*tensors):
        return softmax_free_attention(*tensors, solver=solver)

    for name in ("fake", EAGER):
        fake.ran.clear()
        with use_backend(name, *OPERATORS):
            for ours, truth in zip(both_passes(compiled), expected, strict=True):
                torch.testing.assert_close(ours, truth)
        assert len(set(fake.ran)) == (4 if name == "fake" else 0)
    fake.refused["gaussian_kernel_product"] = "not today"
    with use_backend("fake"), pytest.raises(RuntimeError, match="not today"):
        both_passes(compiled)
    assert counter.frame_count == 1


@needs_torch_2_6
def test_an_exported_program_chooses_anew_at_each_call(fake):
    class Module(torch.nn.Module):
        def forward(self, q, v, landmarks):
            return softmax_free_attention(q, v, landmarks)

    tensors = tuple(t.detach() for t in arguments())
    program = torch.export.export(Module(), tensors).module()
    assert not fake.ran
    expected = program(*tensors)
    assert set(fake.ran) == {"gaussian_kernel_product", "newton_raphson_pinv"}
    fake.ran.clear()
    with use_backend(EAGER):
        assert torch.equal(program(*tensors), expected)
    assert not fake.ran


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_run_plain_torch_or_raise(fake):
    """Operators know no tangents: plain torch takes their place, or they raise if asked for."""
    tensors = tuple(t.detach() for t in arguments())
    q = torch.randn(1, 24, 4)

    def attend(solver="newton"):
        return lambda *sample: softmax_free_attention(*(t[None] for t in sample), solver=solver)

    def patches(q):
        return landmark_patches(q, (4, 6), 2, 2)

    calls = {
        "gaussian_kernel_product": lambda: jvp(softmax_free_attention, tensors, tensors)[1],
        "tikhonov_solve": lambda: vmap(attend("direct"))(*tensors),
        "newton_raphson_pinv": lambda: vmap(attend())(*tensors),
        **{
            f"{name}_backward": lambda solver=solver: grad(
                lambda landmarks: softmax_free_attention(
                    *tensors[:2], landmarks, solver=solver
                ).sum()
            )(tensors[2])
            for solver, name in (("newton", "newton_raphson_pinv"), ("direct", "tikhonov_solve"))
        },
        "landmark_patches": lambda: jvp(patches, (q,), (q,))[1],
        "gaussian_kernel_product_backward": lambda: grad(
            lambda q: softmax_free_attention(q, *tensors[1:]).sum()
        )(tensors[0]),
        "landmark_patches_backward": lambda: grad(lambda q: patches(q).sum())(q),
    }
    for name, call in calls.items():
        expected = call()
        with use_backend(EAGER):
            assert torch.equal(call(), expected)
        assert expected.any()
        with use_backend("fake", name), pytest.raises(RuntimeError, match=f"{name} was asked"):
            call()
        with use_backend("fake", name, strict=False):
            assert torch.equal(call(), expected)
    assert not fake.ran


def test_tangents_of_a_backward_pass_come_from_plain_torch_or_raise(fake):
    q, w = torch.randn(1, 24, 4).requires_grad_(), torch.randn(1, 6, 2, 4, 2).requires_grad_()
    (grad,) = torch.autograd.grad(landmark_patches(q, (4, 6), 2, 2), q, w, create_graph=True)
    for name, out, leaf in (
        ("landmark_patches_backward", landmark_patches(q, (4, 6), 2, 2), q),
        ("landmark_patches", grad, w),
    ):
        with forward_ad.dual_level(), use_backend("fake", name):
            cotangent = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(RuntimeError, match=f"{name} was asked"):
                torch.autograd.grad(out, leaf, cotangent)


@pytest.mark.cpu
def test_the_kernel_is_stored_or_streamed_as_asked(fake):
    pair = "gaussian_kernel_pair"
    tensors = arguments()
    with torch.no_grad():
        stored = softmax_free_attention(*tensors)
        assert set(fake.ran) == {"newton_raphson_pinv"}
        with use_backend("streamed", pair):
            streamed = softmax_free_attention(*tensors)
        assert fake.ran.count("gaussian_kernel_product") == 2
        torch.testing.assert_close(stored, streamed)
        fake.ran.clear()
        with use_backend("fake"):  # its product would not be used at all
            softmax_free_attention(*tensors)
            assert fake.ran.count("gaussian_kernel_product") == 2
            with use_backend("stored"), pytest.raises(RuntimeError, match="to run as fake"):
                softmax_free_attention(*tensors)
        with use_backend("stored"):
            assert torch.equal(softmax_free_attention(*tensors), stored)
            n = BLOCK_ELEMENTS[device_type()] // 16
            q, landmarks = torch.zeros(1, 1, n + 1, 8), torch.zeros(1, 1, 16, 8)
            softmax_free_attention(q[:, :, 1:], q[:, :, 1:], landmarks)
            with pytest.raises(RuntimeError, match="more than 524288 elements"):
                softmax_free_attention(q, q, landmarks)
    with use_backend("stored"), pytest.raises(RuntimeError, match="evaluation on a CPU"):
        softmax_free_attention(*tensors)


@pytest.mark.parametrize(
    ("found", "reason"),
    [("2.1.0", "Triton 2.1.0 is older than 3.4: update torch"), ("3.10.0", None)],
)
def test_triton_of_older_torch_is_refused(monkeypatch, found, reason):
    monkeypatch.setattr(launch, "DEVICES", {"cpu"})
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    monkeypatch.setattr(launch, "version", lambda name: found)
    monkeypatch.setattr(launch, "lacking", launch.lacking.__wrapped__)  # which remembers
    assert launch.refusal(torch.ones(1, device="cpu")) == reason


def test_gpus_without_what_kernels_need_are_refused(monkeypatch):
    """A tensor of a GPU is not needed to say so; kernels are launched on its own device."""
    kind = dict(dtype=torch.float32, shape=(1,), numel=lambda: 1, stride=lambda: (1,))
    there, elsewhere = (
        SimpleNamespace(device=torch.device(f"cuda:{number}"), **kind) for number in (1, 0)
    )
    monkeypatch.setattr(launch, "lacking", lambda: None)
    monkeypatch.setattr(launch, "capability", lambda device: (7, 5))
    assert launch.refusal(there) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(launch, "capability", lambda device: (8, 0))
    assert launch.refusal(there) is None
    assert launch.refusal(there, elsewhere) == "the tensors are on several devices"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert launch.refusal(there) == "the kernels are written for NVIDIA GPUs"


def test_a_kernel_is_launched_on_the_device_of_its_arguments(monkeypatch):
    class There(torch.Tensor):
        device = torch.device("cuda:1")

    entered = []

    @contextmanager
    def on(device):
        entered.append(device)
        yield
        entered.append(None)

    module = SimpleNamespace(kernel=lambda x, count: entered.append(count))
    monkeypatch.setattr(launch, "import_module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "device", on)
    launch.lazily("kernels", "kernel")(torch.ones(1, device="cpu").as_subclass(There), 3)
    assert entered == [torch.device("cuda:1"), 3, None]
