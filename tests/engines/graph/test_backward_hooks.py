"""What runs with a compiled stage's backward reads what is there now, and leaves nothing or is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from both_ways import eager, split
from torch import Tensor, nn

import funcstage as fs

FACTOR = 1.0
FACTORS = [1.0]
SEEN: list[Any] = []


def change() -> None:
    global FACTOR
    FACTOR, FACTORS[0] = 3.0, 3.0


@pytest.fixture(autouse=True)
def as_at_first() -> None:
    global FACTOR
    FACTOR, FACTORS[0] = 1.0, 1.0
    SEEN.clear()


def by_global(_: nn.Module, grads: Any, *__: Any) -> Any:
    return (grads[0] * FACTOR,)


def by_content(factors: list[float], _: nn.Module, grads: Any, *__: Any) -> Any:
    return (grads[0] * factors[0],)


def of_output(factors: list[float], _: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output * factors[0]


def of_activation(factors: list[float], grad: Tensor) -> Tensor:
    return grad * factors[0]


class Scales:
    """An object that is a hook, or has some."""

    def __init__(self) -> None:
        self.factors = FACTORS

    def __call__(self, module: nn.Module, grads: Any, *rest: Any) -> Any:
        return by_content(self.factors, module, grads, *rest)

    def by_global(self, module: nn.Module, grads: Any, *rest: Any) -> Any:
        return by_global(module, grads, *rest)

    def of_activation(self, grad: Tensor) -> Tensor:
        return grad * FACTOR


class Watched(nn.Linear):
    """Hooks its output."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        super().__init__(3, 3)
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self.hook)
        return y


def with_hook(register: str, hook: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        getattr(module[1], register)(hook)
        return module

    return make


BACKWARD, BEFORE = "register_full_backward_hook", "register_full_backward_pre_hook"
READING = {
    "a global": with_hook(BACKWARD, by_global),
    "before the backward": with_hook(BEFORE, by_global),
    "a partial's argument": with_hook(BACKWARD, partial(by_content, FACTORS)),
    "an attribute of the hook": with_hook(BACKWARD, Scales()),
    "by a method": with_hook(BACKWARD, Scales().by_global),
    "in the forward": with_hook("register_forward_hook", partial(of_output, FACTORS)),
    "of an activation": lambda: Watched(partial(of_activation, FACTORS)),
    "of an activation, by a method": lambda: Watched(Scales().of_activation),
}


def gradients(module: nn.Module, apply: Any) -> list[Tensor]:
    params, buffers = fs.functionalize(module)[1:]
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.ones(2, 3))
    input_grads, weight_pullback = pullback(torch.ones_like(output))
    return [*input_grads, *weight_pullback().values()]


def eagers(module: nn.Module) -> list[Tensor]:
    x = torch.ones(2, 3, requires_grad=True)
    output = module(x)
    return [*torch.autograd.grad(output, [x, *module.parameters()], torch.ones_like(output))]


@pytest.mark.parametrize("name", READING)
def test_what_hooks_read_may_change_between_calls(name: str) -> None:
    module = READING[name]()
    apply = fs.compile(fs.functionalize(module)[0], backend="aten", fullgraph=True)
    first = eagers(module)
    torch.testing.assert_close(gradients(module, apply), first)
    change()
    now = eagers(module)
    assert not all(map(torch.equal, first, now))
    torch.testing.assert_close(gradients(module, apply), now)


def by_own_weight(module: nn.Linear, grads: Any, _: Any) -> Any:
    return (grads[0] * module.weight.detach().sum(),)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_hook_that_reads_a_parameter_reads_the_one_that_the_stage_was_given(engine: str) -> None:
    module, other = nn.Linear(3, 3), nn.Linear(3, 3)
    for each in (module, other):
        each.register_full_backward_hook(by_own_weight)
    apply, params, buffers = fs.functionalize(module)
    if engine == "aten":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    for given in (params, {name: p.detach() for name, p in other.named_parameters()}):
        output, _, pullback = fs.stage_vjp(apply, given, buffers, torch.ones(2, 3))
        input_grads, weight_pullback = pullback(torch.ones_like(output))
    torch.testing.assert_close([*input_grads, *weight_pullback().values()], eagers(other))


def notes(_: nn.Module, grads: Any, __: Any) -> None:
    SEEN.append(grads[0])


class Notes(nn.Linear):
    """Leaves what its backward saw on itself."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 3)
        self.how, self.count, self.norm = how, 0, None
        self.seen: list[Tensor] = []

    def note(self, grad: Tensor) -> None:
        match self.how:
            case "count":
                self.count += 1
            case "norm":
                self.norm = grad.norm()
            case _:
                self.seen.append(grad)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self.note)
        return y


class NotesBoth(nn.Linear):
    """Has one hook on two activations, which torch hands to a hook of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        z = 2 * y
        if y.requires_grad:
            torch.autograd.graph.register_multi_grad_hook([y, z], lambda grads: SEEN.append(grads[0]))
        return z


LEAVING = {
    "outside of its module": with_hook(BACKWARD, notes),
    "'count'": lambda: Notes("count"),
    "'norm'": lambda: Notes("norm"),
    "a list": lambda: Notes("list"),
    "outside": lambda: NotesBoth(3, 3),
}


@pytest.mark.parametrize("where", LEAVING)
def test_a_backward_that_leaves_something_is_refused_and_has_left_nothing_on_the_module(where: str) -> None:
    module = LEAVING[where]()
    before = {name: value for name, value in vars(module).items() if name in ("count", "norm", "seen")}
    apply, *_ = fs.functionalize(module)
    with pytest.raises(fs.TraceError, match=where):
        gradients(module, fs.compile(apply, backend="aten", fullgraph=True))
    assert {name: vars(module)[name] for name in before} == before
    assert not before.get("seen")
    torch.testing.assert_close(gradients(module, apply), eagers(module))  # as the error says


def late(module: Any, x: Tensor) -> Tensor:
    y = module.first(x)
    y.register_hook(lambda grad: grad * scale)
    scale = y.detach().abs().mean()
    return module.second(y)


def assigned_anew(module: Any, x: Tensor) -> Tensor:
    other: Any = None
    y = module.first(x)

    def add(grad: Tensor) -> Tensor:
        return grad + other.detach()

    y.register_hook(add)
    other = module.second(x)
    return y * other


class Hooked(nn.Module):
    """Puts a hook on a tensor that reads a local, which is assigned later."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.first, self.second, self.body = nn.Linear(3, 3), nn.Linear(3, 3), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@pytest.mark.parametrize("body", [late, assigned_anew])
def test_a_hook_may_read_a_local_that_is_assigned_later(body: Any) -> None:
    torch.manual_seed(0)
    module = Hooked(body)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3)
        torch.testing.assert_close(split(compiled, params, buffers, x), eager(module, x))


def test_a_hook_does_not_hide_what_the_forward_leaves_in_an_outer_variable() -> None:
    kept: Any = None

    def leaves(module: Any, x: Tensor) -> Tensor:
        nonlocal kept
        y = module.first(x)
        y.register_hook(lambda grad: grad * kept)
        kept = y.detach().mean()
        return module.second(y)

    apply, params, buffers = fs.functionalize(Hooked(leaves))
    with pytest.raises(fs.TraceError, match="leaves a tensor in a variable that a function of its module"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(2, 3))
