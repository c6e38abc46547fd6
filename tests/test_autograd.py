"""The reference's three verbs on an eager tape, against plain eager backward."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from funcstage._torch import tape as _tape
from funcstage.autograd import stage_backward, stage_backward_input, stage_backward_weight
from funcstage.errors import ConsumedError, LeafError, StageError, StructureError


def _present(name: str) -> bool:
    module = getattr(torch, name, None)
    return module is not None and module.is_available()


DEVICES = ["cpu", *(name for name in ("cuda", "hpu", "xpu") if _present(name))]
BATCH, WIDTH = 256, 512


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net1 = nn.Linear(width, width)
        self.net2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net2(self.net1(x).relu())


def mlp(device: str) -> tuple[MLP, MLP, Tensor, Tensor]:
    """A stage, its twin for eager, an input and a target."""
    module = MLP().to(device)
    x = torch.randn(BATCH, WIDTH, device=device, requires_grad=True)
    return module, copy.deepcopy(module), x, torch.randn(BATCH, WIDTH, device=device)


def sum_of_squares(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


def grads_of(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# -- the reference's own behaviours ------------------------------------------------------------------------


def test_full_backward_returns_the_input_gradient_and_fills_every_weight_gradient(device: str) -> None:
    module, twin, x, target = mlp(device)
    ref_x = x.detach().clone().requires_grad_()
    grads = stage_backward(sum_of_squares(module(x), target), None, [x])
    sum_of_squares(twin(ref_x), target).backward()
    assert_equal(grads, (ref_x.grad,))
    assert_equal(grads_of(module), grads_of(twin))
    assert x.grad is None


def test_input_backward_returns_the_input_gradient_and_leaves_the_weights_alone(device: str) -> None:
    module, twin, x, target = mlp(device)
    ref_x = x.detach().clone().requires_grad_()
    dinputs, _ = stage_backward_input([sum_of_squares(module(x), target)], None, [x], module.parameters())
    sum_of_squares(twin(ref_x), target).backward()
    assert_equal(dinputs, (ref_x.grad,))
    assert_equal(x.grad, ref_x.grad)
    assert grads_of(module) == [None] * 4


def test_weight_backward_fills_every_weight_gradient(device: str) -> None:
    module, twin, x, target = mlp(device)
    _, groups = stage_backward_input([sum_of_squares(module(x), target)], None, [x], module.parameters())
    returned = stage_backward_weight(module.parameters(), groups, retain_graph=True)
    sum_of_squares(twin(x), target).backward()
    assert_equal(grads_of(module), grads_of(twin))
    assert all(grad is p.grad for grad, p in zip(returned, module.parameters(), strict=True))


def test_ten_microbatches_accumulate(device: str) -> None:
    module, twin, _, _ = mlp(device)
    for _ in range(10):
        x = torch.randn(BATCH, WIDTH, device=device, requires_grad=True)
        target = torch.randn(BATCH, WIDTH, device=device)
        loss = sum_of_squares(module(x), target)
        _, groups = stage_backward_input([loss], None, [x], module.parameters())
        stage_backward_weight(module.parameters(), groups)
        sum_of_squares(twin(x), target).backward()
    torch.testing.assert_close(grads_of(module), grads_of(twin), rtol=1e-4, atol=1e-2)


def test_weights_of_many_microbatches_can_wait_for_one_call() -> None:
    module, waiting = MLP(8), []
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(4, 8, requires_grad=True)
        waiting += stage_backward_input([module(x).sum()], None, [x], module.parameters())[1]
        twin(x).sum().backward()
    stage_backward_weight(module.parameters(), waiting)
    assert_equal(grads_of(module), grads_of(twin))


@pytest.mark.parametrize("pattern", ["gg", "ggg", "g", "g-", "-g", "gg-", "--"])
def test_replaced_gradients_of_a_node_with_one_output_are_summed(device: str, pattern: str) -> None:
    module, _, x, target = mlp(device)
    _, groups = stage_backward_input([sum_of_squares(module(x), target)], None, [x], module.parameters())
    hidden = module.net1(x).relu().detach()
    replaced = []
    for group in groups:
        assert len(group["intermediates"]) == len(group["grads"]) == 1
        entry = tuple(torch.randn(BATCH, WIDTH, device=device) if c == "g" else None for c in pattern)
        group["grads"] = [entry]
        replaced.append(sum(g for g in entry if g is not None))
    stage_backward_weight(module.parameters(), groups)
    if pattern == "--":
        assert grads_of(module) == [None] * 4
        return
    for layer, inp, cotangent in zip((module.net1, module.net2), (x.detach(), hidden), replaced, strict=True):
        torch.testing.assert_close(layer.weight.grad, cotangent.t() @ inp, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.bias.grad, cotangent.sum(0), rtol=1e-4, atol=1e-3)


def test_replaced_gradients_of_a_node_with_several_outputs_are_one_per_output() -> None:
    module = Scale()
    x = torch.randn(4, 6, requires_grad=True)
    a, b = module(x)
    _, (group,) = stage_backward_input([a, b], [torch.ones(4, 6), torch.ones(4, 6)], [x], module.parameters())
    group["grads"] = [(None, torch.full((4, 6), 2.0))]
    stage_backward_weight(module.parameters(), [group], retain_graph=True)
    assert_equal(module.w.grad, torch.full((6,), 8.0))
    group["grads"] = [(torch.ones(4, 6),)]
    stage_backward_weight(module.parameters(), [group])
    assert_equal(module.w.grad, torch.full((6,), 8.0) + x.detach().sum(0))


# -- any stage: I and W together are eager's backward ------------------------------------------------------


class Scale(nn.Module):
    """Two outputs of one node, of which the second reaches the weight only."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _ScaleAndShift.apply(x, self.w)


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx: Any, scaled: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return scaled * w + shifted, (scaled * x + shifted).sum(0)


class _OldStyle(torch.autograd.Function):
    """Arguments of every kind, an output without gradient, and undefined gradients left undefined."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, frozen: Tensor, w: Tensor, count: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, frozen)
        largest = x.argmax()
        ctx.mark_non_differentiable(largest)
        return x @ w * frozen, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, w, frozen = ctx.saved_tensors
        grad = grad * frozen
        return None, grad @ w.t(), None, x.t() @ grad, None


class _NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


class Stage(nn.Module):
    """A stage from a function of itself and its inputs, with the usual weights at hand."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(6, 6) / 3)
        self.b = nn.Parameter(torch.randn(6))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def _branches(s: Stage, x: Tensor) -> Tensor:
    return s.lin(torch.tanh(s.other(x))) + s.lin(x) * s.b


def _norms(s: Stage, x: Tensor) -> Tensor:
    return F.rms_norm(s.lin(s.norm(x)), (6,), s.b)


def _in_place(s: Stage, x: Tensor) -> Tensor:
    y = x * 2
    y[:, :3] = F.linear(x, s.w[:3])
    y[0].add_(s.b)
    return y.mul_(s.b)


def _hyper(s: Stage, x: Tensor) -> Tensor:
    """Weights computed from weights, used at several sites and returned."""
    w, v = torch.tanh(s.w @ s.w).chunk(2)
    return (x @ w.t() @ v) * s.b, x @ w.t(), (s.w * s.w).sum(), v


def _views(s: Stage, x: Tensor) -> Any:
    y = s.lin(x)
    return y.t(), y[1:], y.view(-1), [y.unsqueeze(0)]


def _custom(s: Stage, x: Tensor) -> Any:
    a, largest = _OldStyle.apply("x", torch.tanh(x), torch.full_like(s.b.detach(), 0.5), s.w, 3)
    return _NewStyle.apply(_NewStyle.apply(a, s.w), s.w), largest


def _only_custom_owns(s: Stage, x: Tensor) -> Any:
    return _NewStyle.apply(_NewStyle.apply(x, s.w), s.w)


def _several_outputs(s: Stage, x: Tensor) -> Any:
    a, b = (x @ s.w).chunk(2, -1)
    first, *_, last = torch.addmm(s.b, x, s.w).unbind(0)
    top, _ = (x * s.b).topk(2)
    normed, _, _ = torch.native_layer_norm(x, (6,), s.b, s.b, 1e-5)
    return a * b, first + last, top, torch.cat([normed, s.w]).split(3)


def _checkpointed(s: Stage, x: Tensor) -> Any:
    y = checkpoint(lambda t: s.wn(F.gelu(s.lin(t))), x, use_reentrant=False)
    return s.lin(checkpoint(lambda t: s.lin(t).tanh() @ s.w, y, use_reentrant=False))


def _expanded(s: Stage, x: Tensor) -> Any:
    return x + s.w.view(36)[:6] + s.b[0], torch.addcmul(x, s.b, s.b), torch.where(x > 0, x, s.b)


STAGES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 2)),
    "norms": lambda: Stage(_norms, lin=nn.Linear(6, 6), norm=nn.LayerNorm(6)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)),
    "a weight used twice in a row": lambda: Stage(lambda s, x: s.lin(s.lin(x).relu()), lin=nn.Linear(6, 6)),
    "a weight used on two branches": lambda: Stage(_branches, lin=nn.Linear(6, 6), other=nn.Linear(6, 6)),
    "a weight that meets itself": lambda: Stage(lambda s, x: x @ s.w @ s.w * (s.w * s.w).sum()),
    "weights derived from weights": lambda: Stage(_hyper),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    ),
    "lstm": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(6, 5),
    "attention": lambda: Stage(lambda s, x: s.attn(x, x, x), attn=nn.MultiheadAttention(6, 2)),
    "transformer layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
    "nodes with several outputs": lambda: Stage(_several_outputs),
    "outputs that are views": lambda: Stage(_views, lin=nn.Linear(6, 6)),
    "in-place operations": lambda: Stage(_in_place),
    "broadcast and derived weights": lambda: Stage(_expanded),
    "custom functions": lambda: Stage(_custom),
    "nothing but custom functions": lambda: Stage(_only_custom_owns),
    "a custom function with two outputs": Scale,
    "checkpointing": lambda: Stage(
        _checkpointed, lin=nn.Linear(6, 6), wn=nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    ),
    "weights that meet no input": lambda: Stage(lambda s, x: (x * 2, (s.w * s.w).sum(), torch.tanh(s.b))),
    "an unused weight": lambda: Stage(lambda s, x: x @ s.w),
    "a weight as output": lambda: Stage(lambda s, x: (x @ s.w, s.w, s.b)),
    "the input as output": lambda: Stage(lambda s, x: (x, x @ s.w, x.view(-1))),
    "an output twice": lambda: Stage(lambda s, x: [x @ s.w, s.b.exp()] * 2),
    "an output without gradient": lambda: Stage(lambda s, x: (x @ s.w, x.detach(), x.argmax(), None, "text")),
    "a dict": lambda: Stage(lambda s, x: {"y": [x @ s.w], "z": (x * s.b, {})}),
    "no weights": lambda: nn.Tanh(),
    "promotion": lambda: Stage(lambda s, x: x.double() * s.b + s.w[0]),
    "complex": lambda: Stage(lambda s, x: torch.view_as_real(torch.fft.fft(x) * torch.complex(s.b, s.w[0]))),
}


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from leaves(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from leaves(entry)


def random_like(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.randn_like(value) if value.is_floating_point() else None
    if isinstance(value, dict):
        return {key: random_like(entry) for key, entry in value.items()}
    return [random_like(entry) for entry in value] if isinstance(value, (tuple, list)) else None


def eager(module: nn.Module, args: list[Any], outputs: Any, cotangents: Any) -> list[Tensor | None]:
    """The input gradients; those of the weights are in `.grad`."""
    pairs = [(o, c) for (o, c) in _zip(outputs, cotangents) if c is not None]
    torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
    return [arg.grad if isinstance(arg, Tensor) else None for arg in args]


def _zip(outputs: Any, cotangents: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs, cotangents
    elif isinstance(outputs, dict):
        for key in outputs:
            yield from _zip(outputs[key], cotangents[key])
    elif isinstance(outputs, (tuple, list)):
        for output, cotangent in zip(outputs, cotangents, strict=True):
            yield from _zip(output, cotangent)


def copy_of(arg: Any) -> Any:
    return arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg


def check(module: nn.Module, *args: Any) -> None:
    """F, I, W against eager backward; outputs are dropped before W."""
    twin = copy.deepcopy(module)
    ref_args = [copy_of(arg) for arg in args]
    outputs = module(*args)
    cotangents = random_like(outputs)
    ref_inputs = eager(twin, ref_args, twin(*ref_args), cotangents)
    expected = grads_of(twin)

    dinputs, groups = stage_backward_input(outputs, cotangents, args, module.parameters())
    assert_equal([*dinputs], ref_inputs)
    assert [p.grad for p in module.parameters()] == [None] * len(expected)
    for output in leaves(outputs):
        assert output.grad_fn is not None or output.is_leaf
    del outputs
    returned = stage_backward_weight(module.parameters(), groups, retain_graph=True)
    assert_equal([*returned], expected)
    assert_equal(grads_of(module), expected)
    for _ in range(2):
        stage_backward_weight(module.parameters(), groups, retain_graph=True)
    assert_equal(grads_of(module), [None if g is None else 3 * g for g in expected])
    assert_equal([*dinputs], ref_inputs)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("first_stage", [False, True])
def test_input_and_weight_backward_are_eager_backward(device: str, name: str, first_stage: bool) -> None:
    module = STAGES[name]().to(device)
    args = [torch.randn(5, 6, device=device, requires_grad=not first_stage)]
    if name == "lstm":
        args += [tuple(torch.randn(4, 5, device=device) for _ in range(2))]
    if first_stage and not any(True for _ in leaves(module(*args))):
        return  # nothing to differentiate
    check(module, *args)


@pytest.mark.parametrize("name", STAGES)
def test_full_backward_is_eager_backward(device: str, name: str) -> None:
    module = STAGES[name]().to(device)
    twin = copy.deepcopy(module)
    x = torch.randn(5, 6, device=device, requires_grad=True)
    ref_x = x.detach().clone().requires_grad_()
    outputs = module(x)
    cotangents = random_like(outputs)
    expected = eager(twin, [ref_x], twin(ref_x), cotangents)
    assert_equal([*stage_backward(outputs, cotangents, [x])], expected)
    assert_equal(grads_of(module), grads_of(twin))


class Embedder(nn.Module):
    """A first stage: token and position embeddings under a tied head, and a regulariser of weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.lin = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.lin(self.tokens(ids) + self.positions)
        return h @ self.tokens.weight.t(), self.positions.square().sum()


def test_a_first_stage_has_no_input_gradient_and_all_weight_gradients(device: str) -> None:
    check(Embedder().to(device), torch.randint(11, (3, 5), device=device))


def test_inputs_of_every_kind_are_accepted(device: str) -> None:
    module = Stage(lambda s, x, n, t, unused, ids: x @ s.w * n + t.sum() * s.b + s.w[ids]).to(device)
    x, unused = (torch.randn(5, 6, device=device, requires_grad=True) for _ in range(2))
    check(module, x, 3, torch.randn(2, device=device), unused, torch.tensor([0, 1, 1, 0, 2], device=device))


def test_an_input_given_twice_has_its_gradient_accumulated_once() -> None:
    module, x = MLP(6), torch.randn(5, 6, requires_grad=True)
    dinputs, _ = stage_backward_input([module(x).sum()], None, [x, x], module.parameters())
    assert_equal(dinputs[0], dinputs[1])
    assert_equal(x.grad, dinputs[0])


def test_input_gradients_accumulate_without_disturbing_weights_that_wait() -> None:
    module = Stage(lambda s, x: x + s.w[0])
    x = torch.randn(5, 6, requires_grad=True)
    waiting = [stage_backward_input([module(x)], None, [x], module.parameters())[1] for _ in range(3)]
    assert_equal(x.grad, torch.full((5, 6), 3.0))
    for groups in waiting:
        stage_backward_weight(module.parameters(), groups)
    assert_equal(module.w.grad[0], torch.full((6,), 15.0))


@pytest.mark.parametrize("verb", ["full", "input"])
def test_an_input_with_a_history_has_its_gradient_returned(verb: str) -> None:
    module, source = MLP(6), torch.randn(5, 6, requires_grad=True)
    x = source.exp()
    outside = module.net1(source.detach() * 2).sum() * x.sum()
    output = module(x).sum()
    (expected,) = torch.autograd.grad(output, x, retain_graph=True)
    if verb == "full":
        dinputs = stage_backward(output, None, [x])
    else:
        dinputs, _ = stage_backward_input([output], None, [x], module.parameters())
        assert source.grad is None
    assert_equal(dinputs, (expected,))
    assert outside.requires_grad


def test_none_is_no_gradient_at_tensors_and_one_at_scalars() -> None:
    module = Stage(lambda s, x: (x @ s.w, (x * s.b).sum()))
    x = torch.randn(5, 6, requires_grad=True)
    dinputs, groups = stage_backward_input(module(x), [None, None], [x], module.parameters())
    assert_equal(dinputs[0], module.b.detach().expand(5, 6))
    assert stage_backward_weight([module.w], []) == (None,)
    stage_backward_weight(module.parameters(), groups)
    assert module.w.grad is None
    assert_equal(module.b.grad, x.detach().sum(0))


def test_a_stage_whose_outputs_need_no_gradient_has_none() -> None:
    module, x = MLP(6), torch.randn(5, 6)
    with torch.no_grad():
        output = module(x)
    assert stage_backward(output, None, [x]) == (None,)
    assert stage_backward_input([output], None, [x], module.parameters()) == ((None,), [])
    assert stage_backward_weight(module.parameters(), []) == (None,) * 4


def test_frozen_weights_are_passed_over() -> None:
    module, x = MLP(6), torch.randn(5, 6, requires_grad=True)
    module.net1.requires_grad_(False)
    check(module, x)


def test_only_the_weights_named_get_gradients() -> None:
    module, x = MLP(6), torch.randn(5, 6, requires_grad=True)
    _, groups = stage_backward_input([module(x).sum()], None, [x], module.net2.parameters())
    stage_backward_weight(module.net2.parameters(), groups)
    assert [grad is None for grad in grads_of(module)] == [True, True, False, False]


def test_hooks_on_weights_and_outputs_run_as_in_eager() -> None:
    def hooked(module: MLP, seen: list[str]) -> MLP:
        module.net1.weight.register_hook(lambda grad: grad * 2)
        module.net2.bias.register_hook(lambda grad: grad * 3)
        module.net2.bias.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
        return module

    seen: list[str] = []
    module = hooked(MLP(6), seen)
    twin = hooked(copy.deepcopy(module), [])
    x = torch.randn(5, 6, requires_grad=True)
    for m in (module, twin):
        output = m(x)
        output.register_hook(lambda grad: grad * 5)
        if m is twin:
            output.sum().backward()
        else:
            _, groups = stage_backward_input([output.sum()], None, [x], m.parameters())
            stage_backward_weight(m.parameters(), groups)
    assert_equal(grads_of(module), grads_of(twin))
    assert seen == ["accumulated"]


def test_autocast_stages_split() -> None:
    module, x = MLP(6), torch.randn(5, 6, requires_grad=True)
    twin, ref_x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = module(x).float().sum(), twin(ref_x).float().sum()
    expected.backward()
    dinputs, groups = stage_backward_input([output], None, [x], module.parameters())
    stage_backward_weight(module.parameters(), groups)
    assert_equal(dinputs, (ref_x.grad,))
    assert_equal(grads_of(module), grads_of(twin))


def test_weight_backward_works_where_gradients_are_switched_off() -> None:
    module, x = MLP(6), torch.randn(5, 6, requires_grad=True)
    twin = copy.deepcopy(module)
    output = module(x).sum()
    with torch.no_grad():
        _, groups = stage_backward_input([output], None, [x], module.parameters())
        stage_backward_weight(module.parameters(), groups)
    twin(x).sum().backward()
    assert_equal(grads_of(module), grads_of(twin))


def test_outputs_stay_usable_after_input_backward() -> None:
    module, x = nn.LSTM(6, 5), torch.randn(4, 3, 6, requires_grad=True)
    twin, ref_x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    output, _ = module(x)
    _, groups = stage_backward_input([output], None, [x], module.parameters())
    (again,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    stage_backward_weight(module.parameters(), groups)
    twin(ref_x)[0].square().sum().backward()
    assert_equal(again, ref_x.grad)


def test_a_tape_of_thousands_of_layers_is_walked_without_recursion() -> None:
    w = nn.Parameter(torch.full((), 1.0))
    x = torch.ones((), requires_grad=True)
    y = x
    for _ in range(2000):
        y = y * w + w
    dinputs, groups = stage_backward_input([y], None, [x], [w])
    assert_equal(dinputs, (torch.ones(()),))
    stage_backward_weight([w], groups)
    assert_equal(w.grad, torch.tensor(2000 + sum(range(2001)) * 1.0))


# -- the split is exact ------------------------------------------------------------------------------------


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


SPLITTABLE: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(16),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (2, 8)), nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 2)),
    "tied in a row": lambda: Stage(lambda s, x: s.lin(s.lin(s.lin(x)).relu()), lin=nn.Linear(16, 16)),
    "tied on branches": lambda: Stage(_branches, lin=nn.Linear(16, 6), other=nn.Linear(16, 16)),
    "transformer layer": lambda: nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 6)),
}


@pytest.mark.parametrize("name", SPLITTABLE)
def test_no_operation_runs_twice(name: str) -> None:
    module, x = SPLITTABLE[name](), torch.randn(5, 16, requires_grad=True)
    weights = list(module.parameters())
    whole = flops(module(x).sum().backward)
    loss = module(x).sum()
    only_input = flops(lambda: torch.autograd.grad(loss, x, retain_graph=True))
    groups: list[Any] = []
    in_i = flops(lambda: groups.extend(stage_backward_input([loss], None, [x], weights)[1]))
    in_w = flops(lambda: stage_backward_weight(weights, groups))
    assert in_i == only_input
    assert in_i + in_w == whole


def test_weight_backward_of_linear_layers_is_one_product_each() -> None:
    module, x = MLP(16), torch.randn(5, 16, requires_grad=True)
    _, groups = stage_backward_input([module(x).sum()], None, [x], module.parameters())
    assert flops(lambda: stage_backward_weight(module.parameters(), groups)) == 2 * (2 * 5 * 16 * 16)


def test_input_backward_of_a_first_stage_does_nothing() -> None:
    module, ids = Embedder(), torch.randint(11, (3, 5))
    output = module(ids)[0].sum()
    groups: list[Any] = []
    in_i = flops(lambda: groups.extend(stage_backward_input([output], None, [ids], module.parameters())[1]))
    assert in_i == 0
    assert flops(lambda: stage_backward_weight(module.parameters(), groups)) == flops(
        module(ids)[0].sum().backward
    )


# -- what is kept, and for how long ------------------------------------------------------------------------


def test_waiting_weights_keep_no_outputs_and_weight_backward_frees_the_rest() -> None:
    activations: list[weakref.ref[Tensor]] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        activations.append(weakref.ref(output))

    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Stage(_only_custom_owns))
    module[1].register_forward_hook(note)
    x = torch.randn(5, 6, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        output = module(x) * 2
        loss = output.square().sum()
        _, groups = stage_backward_input([loss], None, [x], module.parameters())
        gone = weakref.ref(output), weakref.ref(loss)
        del output, loss
        assert [ref() for ref in gone] == [None, None]
        kept = activations + [weakref.ref(g) for group in groups for entry in group["grads"] for g in entry]
        assert all(ref() is not None for ref in kept)
        stage_backward_weight(module.parameters(), groups)
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_a_custom_function_lives_until_weight_backward_though_its_output_is_dropped() -> None:
    module = Stage(_only_custom_owns)
    twin = copy.deepcopy(module)
    x = torch.randn(5, 6, requires_grad=True)
    output = module(x)
    _, groups = stage_backward_input(output, None, [x], module.parameters())
    del output
    stage_backward_weight(module.parameters(), groups)
    twin(x).sum().backward()
    assert_equal(module.w.grad, twin.w.grad)


def test_weight_gradients_share_no_memory_with_cotangents() -> None:
    module = Stage(lambda s, x: torch.cat([x, s.w.view(6, 6)]) + s.b)
    x, cotangent = torch.randn(5, 6, requires_grad=True), torch.ones(11, 6)
    _, groups = stage_backward_input(module(x), cotangent, [x], module.parameters())
    stage_backward_weight(module.parameters(), groups)
    module.w.grad.zero_()
    module.b.grad.zero_()
    assert_equal(cotangent, torch.ones(11, 6))


# -- refusals ----------------------------------------------------------------------------------------------


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    x = torch.randn(5, 6, requires_grad=True)
    return stage_backward_input([module(x).sum()], None, [x], module.parameters())[1]


def test_consumed_groups_are_refused_and_the_way_to_keep_them_is_named() -> None:
    module = MLP(6)
    groups = groups_of(module)
    stage_backward_weight(module.parameters(), groups)
    before = [p.grad.clone() for p in module.parameters()]
    with pytest.raises(ConsumedError, match=r"param_groups\[0\].*retain_graph=True"):
        stage_backward_weight(module.parameters(), groups)
    assert_equal(grads_of(module), before)


def _drop_grads(groups: list[Any]) -> list[Any]:
    del groups[1]["grads"]
    return groups


def _set_grads(grads: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda groups: [groups[0], {**groups[1], "grads": grads}]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda _: [{}], StructureError, r"param_groups\[0\]: expected a dict"),
        (lambda _: [7], StructureError, r"param_groups\[0\]: expected a dict"),
        (_drop_grads, StructureError, r"param_groups\[1\].*\"grads\""),
        (_set_grads([]), StructureError, r"param_groups\[1\]\['grads'\]: expected a list of 1"),
        (_set_grads(torch.ones(5, 6)), StructureError, r"param_groups\[1\]\['grads'\]: expected a list of 1"),
        (_set_grads([()]), StructureError, r"\['grads'\]\[0\]: expected a tuple of one or more"),
        (_set_grads([torch.ones(5, 6)]), StructureError, r"\['grads'\]\[0\]: expected a tuple"),
        (_set_grads([(None, 1.0)]), StructureError, r"\['grads'\]\[0\]\[1\]: expected a tensor or None"),
        (_set_grads([(None, torch.ones(5, 7))]), LeafError, r"\[0\]\[1\]: .*\(5, 6\).*\(5, 7\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name_and_nothing_is_used(
    spoil: Callable[[list[Any]], list[Any]], error: type[StageError], message: str
) -> None:
    module = MLP(6)
    spoiled = spoil(groups_of(module))
    with pytest.raises(error, match=message):
        stage_backward_weight(module.parameters(), spoiled)
    assert grads_of(module) == [None] * 4
    if len(spoiled) == 2:
        spoiled[1]["grads"] = [(torch.ones(5, 6),)]
        stage_backward_weight(module.parameters(), spoiled)
        assert all(grad is not None for grad in grads_of(module))


def test_more_gradients_than_outputs_of_a_node_with_several_are_refused() -> None:
    module, x = Scale(), torch.randn(5, 6, requires_grad=True)
    _, (group,) = stage_backward_input(module(x), None, [x], module.parameters())
    group["grads"] = [(torch.ones(5, 6),) * 3]
    with pytest.raises(StructureError, match="at most 2 entries"):
        stage_backward_weight(module.parameters(), [group])


def test_weights_that_would_lose_their_gradient_are_refused() -> None:
    module = MLP(6)
    groups = groups_of(module)
    with pytest.raises(StructureError, match=r"param_groups\[1\]\['params'\]\[0\].*\(6, 6\)"):
        stage_backward_weight(module.net1.parameters(), groups)
    assert grads_of(module) == [None] * 4


@pytest.mark.parametrize("verb", ["full", "input"])
@pytest.mark.parametrize(
    ("cotangents", "error", "message"),
    [
        ([torch.ones(5, 6)], StructureError, r"output_grads: expected entries \[0, 1\].*\[0\]"),
        (torch.ones(5, 6), StructureError, "output_grads: expected a tuple"),
        ([torch.ones(5, 6), torch.ones(6)], StructureError, r"output_grads\[1\]: expected a dict"),
        ([torch.ones(5, 6), {"z": torch.ones(6)}], StructureError, r"output_grads\[1\]: expected entries"),
        ([torch.ones(5, 7), {"a": torch.ones(5, 6)}], LeafError, r"output_grads\[0\].*\(5, 6\).*\(5, 7\)"),
        ([torch.ones(5, 6), {"a": 1.0}], StructureError, r"output_grads\[1\]\['a'\]: expected a tensor"),
    ],
)
def test_output_gradients_that_do_not_fit_are_refused_by_name(
    verb: str, cotangents: Any, error: type[StageError], message: str
) -> None:
    module = Stage(lambda s, x: (x @ s.w, {"a": x * s.b}))
    x = torch.randn(5, 6, requires_grad=True)
    outputs = module(x)
    call = {
        "full": lambda: stage_backward(outputs, cotangents, [x]),
        "input": lambda: stage_backward_input(outputs, cotangents, [x], module.parameters()),
    }[verb]
    with pytest.raises(error, match=message):
        call()
    assert x.grad is None
    assert grads_of(module) == [None] * 2


def test_an_input_backward_that_fails_changes_nothing() -> None:
    module = MLP(6)
    x = torch.randn(5, 6, requires_grad=True)
    loss = checkpoint(module, x, use_reentrant=True).sum()  # torch: incompatible with autograd.grad
    with pytest.raises(RuntimeError, match="use_reentrant"):
        stage_backward_input([loss], None, [x], module.parameters())
    assert x.grad is None
    assert grads_of(module) == [None] * 4


def test_full_backward_of_a_tensor_without_gradient_is_refused() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    with pytest.raises(LeafError, match="Only a scalar"):
        stage_backward(x * 2, None, [x])


def test_full_backward_can_choose_among_outputs() -> None:
    module, x = Stage(lambda s, x: (x @ s.w, x * s.b)), torch.randn(5, 6, requires_grad=True)
    (dx,) = stage_backward(module(x), [None, torch.ones(5, 6)], [x], outputs_with_grads_idxs=[1])
    assert_equal(dx, module.b.detach().expand(5, 6))
    assert module.w.grad is None


# -- what is asked of torch's private side -----------------------------------------------------------------


def test_torch_nodes_say_how_many_outputs_they_have() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    for output, shapes in ((x.chunk(2)[0], [(2, 6), (2, 6)]), (x.tanh(), [(4, 6)]), (x.topk(2)[0], [(4, 2)])):
        assert _tape.output_shapes(output.grad_fn) == shapes, "torch changed node._input_metadata"


def test_torch_nodes_called_during_backward_compute_only_what_the_run_wants() -> None:
    x, w = torch.randn(5, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    node, got = torch.mm(x, w).grad_fn, []
    (_, to_w) = node.next_functions
    _tape.during_backward([to_w], lambda: got.extend(_tape.call_node(node, [torch.ones(5, 6)])))
    assert got[0] is None, "torch now computes unwanted gradients of nodes called from Python"
    assert_equal(got[1], x.detach().t() @ torch.ones(5, 6))


def test_torch_function_nodes_are_contexts_with_a_backward_to_apply() -> None:
    x, w = torch.randn(5, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    output = _NewStyle.apply(x, w)
    assert _tape.is_python(output.grad_fn), "torch changed the base class of autograd.Function contexts"
    assert get_gradient_edge(output).ownership_token is not None
    gradients = _tape.call_node(output.grad_fn, [torch.ones(5, 6)])
    assert_equal(gradients, [torch.ones(5, 6) @ w.detach().t(), x.detach().t() @ torch.ones(5, 6)])


def test_torch_tells_views_from_copies() -> None:
    x = torch.randn(4, 6)
    assert torch._C._is_alias_of(x, x.t())
    assert not torch._C._is_alias_of(x, x.clone())


def test_torch_accumulates_from_a_weights_own_edge() -> None:
    w = nn.Parameter(torch.zeros(3))
    torch.autograd.backward((GradientEdge(*get_gradient_edge(w)[:2]),), (torch.ones(3),), inputs=(w,))
    assert_equal(w.grad, torch.ones(3))
