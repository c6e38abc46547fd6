"""Trainable tensors that a stage reads without being handed them: W would not return their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

SHIFT = nn.Parameter(torch.ones(3))


class Reading(nn.Module):
    """Keeps its parameter in other places than the one under which it is registered."""

    def __init__(self, read: Callable[[Reading], Tensor], how: str = "") -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.listed, self.named = [self.scale], {"scale": self.scale}
        scale = self.scale
        self.closed = lambda: scale
        self.hidden: Iterator[Tensor] = iter(())
        self.read, self.how, self.calls = read, how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + torch.rand(3)
        if self.how == "in a checkpoint":
            return checkpoint(lambda y: self.lin(y) * self.read(self), x, use_reentrant=False)
        output = self.lin(x) * self.read(self)
        if self.how == "beside a gradient taken inside":
            output = output * torch.func.grad(lambda y: y.sin().sum())(x)
        return output


def staged(module: nn.Module, engine: str) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    apply, params, _ = fs.functionalize(module)
    return (apply if engine == "closures" else fs.compile(apply, backend="aten")), params


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("how", ["", "in a checkpoint"])
def test_a_captured_parameter_is_refused_and_the_refusal_leaves_nothing_behind(how: str, engine: str) -> None:
    module = Reading(lambda m: SHIFT, how)
    stage, params = staged(module, engine)
    before = torch.get_rng_state()
    with pytest.raises(fs.StageError, match="which requires grad and is not handed to it"):
        fs.stage_vjp(stage, params, {}, torch.ones(2, 3))
    assert module.calls == 0
    assert torch.equal(torch.get_rng_state(), before)


ELSEWHERE: dict[str, Callable[[Reading], Tensor]] = {
    "a list": lambda m: m.listed[0],
    "a dict": lambda m: m.named["scale"] * 2,
    "a cell": lambda m: m.closed(),
}


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("how", ["", "in a checkpoint", "beside a gradient taken inside"])
@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_parameter_that_is_found_in_another_place_gets_its_gradient(
    where: str, how: str, engine: str
) -> None:
    check(Reading(ELSEWHERE[where], how), engine)


def test_the_refusal_names_the_parameter() -> None:
    module = Reading(lambda m: next(m.hidden))
    module.hidden = (scale for scale in [module.scale])  # where nobody sees it
    module.listed, module.named, module.closed = [], {}, lambda: module.scale
    stage, params = staged(module, "closures")
    with pytest.raises(fs.StageError, match="the module's own parameter 'scale'"):
        fs.stage_vjp(stage, params, {}, torch.ones(2, 3))


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.listed[0].detach(),
        lambda m: m.listed[0].shape[0],
        lambda m: m.named["scale"] > 0,
        lambda m: nn.Parameter(torch.ones(3)),
        lambda m: m.scale,
    ],
    ids=["detached", "its shape", "a comparison", "one made inside", "its place"],
)
def test_a_captured_parameter_may_be_read_as_a_constant(
    read: Callable[[Reading], Tensor], engine: str
) -> None:
    check(Reading(read), engine)


def check(module: Reading, engine: str) -> None:
    """Compare with eager."""
    x = torch.randn(2, 3)
    stage, params = staged(module, engine)
    torch.manual_seed(0)
    expected = module(x)
    grads = torch.autograd.grad(expected.sum(), [*module.parameters()], allow_unused=True)
    torch.manual_seed(0)
    output, _, pullback = fs.stage_vjp(stage, params, {}, x)
    got = pullback(torch.ones_like(output))[1]()
    assert torch.equal(output, expected)
    for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
        assert got[name] is None if grad is None else torch.allclose(got[name], grad)


class Elsewhere:
    """What another module of the user's holds."""

    weight = nn.Parameter(torch.ones(4))
    others: ClassVar = [torch.ones(4, requires_grad=True)]


def closing_over(weight: Tensor) -> Any:
    return lambda y: y * weight


HELPERS: dict[str, Any] = {
    "an attribute of a class": lambda y: y * Elsewhere.weight,
    "an entry of a list": lambda y: y * Elsewhere.others[0],
    "a cell": closing_over(torch.ones(4, requires_grad=True)),
    "a module": nn.Linear(4, 4).forward,
}


class Differentiating(nn.Linear):
    """Takes gradients inside, so that it is split on a plain tape, and calls a helper."""

    def __init__(self, helper: Any) -> None:
        super().__init__(4, 4)
        self.helper = [helper]

    def forward(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (inner,) = torch.autograd.grad(leaf.sin().sum(), leaf, create_graph=True)
        y: Tensor = self.helper[0](super().forward(x) + inner)
        return y


@pytest.mark.parametrize("helper", HELPERS)
def test_what_a_helper_captures_is_refused_on_a_plain_tape_too(helper: str) -> None:
    apply, params, buffers = fs.functionalize(Differentiating(HELPERS[helper]))
    with pytest.raises(fs.StageError, match="requires grad and is not handed to it"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))


OWN: dict[str, Any] = {
    "a parameter": lambda y: y * nn.Parameter(torch.ones(4)),
    "a layer": lambda y: y * nn.Linear(4, 4).weight[0],
    "a factory's": lambda y: y * torch.ones(4, requires_grad=True),
    "marked": lambda y: y * torch.ones(4).requires_grad_(),
}


@pytest.mark.parametrize("own", OWN)
def test_a_leaf_that_the_stage_makes_is_none_that_it_captures(own: str) -> None:
    apply, params, buffers = fs.functionalize(Differentiating(OWN[own]))
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))
    assert pullback(torch.ones_like(output))[1]()["weight"] is not None
