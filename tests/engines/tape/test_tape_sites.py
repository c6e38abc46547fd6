"""Sites of stages on a plain tape: those that take gradients inside themselves, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage import trees


class Slope(nn.Module):
    """Reads its first weight twice, in a product and in the product's own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return self.out(torch.autograd.grad(self.linear(x).tanh().sum(), x, create_graph=True)[0])


class Checkpointed(Slope):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Forces(nn.Module):
    """A molecule's energy and forces, out of positions and kinds of atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.first, self.second = nn.Embedding(5, 3), nn.Linear(6, 7), nn.Linear(7, 1)

    def forward(self, positions: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.detach().requires_grad_()
        h = torch.cat([positions, self.kinds(kinds)], dim=-1)
        energy = self.second(self.first(h).tanh()).sum((1, 2))
        (forces,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy, forces


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], Any]] = {
    "a slope": (Slope, lambda: (torch.randn(4, 3),), None),
    "a slope in a first stage": (Slope, lambda: (torch.randn(4, 3),), ()),
    "a checkpointed slope": (Checkpointed, lambda: (torch.randn(4, 3),), None),
    "forces": (Forces, lambda: (torch.randn(4, 2, 3), torch.randint(5, (4, 2))), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_sites_yield_each_examples_gradient_where_a_stage_takes_gradients(case: str) -> None:
    make, draw, argnums = CASES[case]
    torch.manual_seed(0)
    module, args = make().double(), tuple(x.double() if x.is_floating_point() else x for x in draw())
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args, argnums=argnums)
    cotangents = trees.map_leaves(torch.randn_like, output)
    _, weight_pullback = pullback(cotangents)
    sites = weight_pullback.sites
    for i in range(4):
        outputs, _ = trees.flatten(module(*(x[i : i + 1] for x in args)))
        grads = [grad[i : i + 1] for grad in trees.flatten(cotangents)[0]]
        expected = torch.autograd.grad(outputs, list(module.parameters()), grads, allow_unused=True)
        found: dict[str, Tensor] = {}
        for site in sites:
            alone, rows = torch.zeros_like(site.cotangent), len(site.cotangent) // 4
            alone[i * rows : (i + 1) * rows] = site.cotangent[i * rows : (i + 1) * rows]
            for name, grad in site.vjp(alone).items():
                found[name] = found.get(name, torch.zeros(())) + grad
        for (name, _), grad in zip(module.named_parameters(), expected, strict=True):
            if grad is not None:
                torch.testing.assert_close(found[name], grad)
    assert weight_pullback().keys() == params.keys()  # nothing was used up
    with pytest.raises(fs.ConsumedError):
        sites[0].vjp()


def test_operations_on_a_plain_tape_are_sites_with_names_and_inputs() -> None:
    apply, params, buffers = fs.functionalize(Slope())
    x = torch.randn(4, 3)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    sites = pullback(torch.randn(4, 2))[1].sites
    assert [(site.name, site.params) for site in sites] == [
        ("addmm", ("linear.bias", "linear.weight")),
        ("mm", ("linear.weight",)),
        ("addmm", ("out.bias", "out.weight")),
    ]
    assert torch.equal(sites[0].inputs[0], x)


class AddsToGrad(torch.autograd.Function):
    """Calls backward() in its backward, as some implicit layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            (x.detach() * weight).backward(grad)
        return grad * weight, None


def test_gradients_that_are_added_past_their_sites_are_named_with_the_way_out() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.weight = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return AddsToGrad.apply(self.linear(x), self.weight)

    apply, params, buffers = fs.functionalize(Stage())
    _, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(4, 3))
    _, weight_pullback = pullback(torch.ones(4, 3))
    with pytest.raises(fs.StageError, match=r"gradients of weight past their sites.*torch\.autograd\.grad"):
        _ = weight_pullback.sites
    assert weight_pullback()["weight"] is not None
