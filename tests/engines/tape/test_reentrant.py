"""Reentrant checkpoints where they run once, and what their regions may not ask there."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

x = torch.randn(3, 4)


class Region(nn.Module):
    """Scales what its region returns by what that region asks."""

    def __init__(self, asks: Callable[[Any, Tensor, Tensor], Any], reentrant: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.asks, self.reentrant = asks, reentrant

    def body(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y) * (1 + float(self.asks(self, x, y)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return y.sin()


class Passing(Region):
    """Runs on a plain tape, as a queue passes on what it computes."""

    def __init__(self, asks: Callable[[Any, Tensor, Tensor], Any], reentrant: bool = True) -> None:
        super().__init__(asks, reentrant)
        self.queue: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def forward(self, x: Tensor) -> Tensor:
        self.queue.put(super().forward(x))
        return self.queue.get()


def assert_eagers(module: nn.Module, compiled: bool) -> None:
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    expected.sum().backward()
    wanted = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    output, _, pullback = fs.stage_vjp(*stage_of(module, compiled), x)
    (of_input,), weight_pullback = pullback(torch.ones_like(output))
    torch.testing.assert_close(output, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(of_input, leaf.grad)
    torch.testing.assert_close(weight_pullback(), wanted)


def stage_of(module: nn.Module, compiled: bool) -> Any:
    apply, params, buffers = fs.functionalize(module)
    return fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply, params, buffers


ASKED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "whether gradients are on": lambda m, x, y: torch.is_grad_enabled(),
    "by another name": lambda m, x, y: torch._C.is_grad_enabled(),
    "requires_grad": lambda m, x, y: y.requires_grad,
    "grad_fn": lambda m, x, y: y.tanh().grad_fn is None,
    "is_leaf": lambda m, x, y: y.is_leaf,
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_a_region_is_answered_otherwise_in_each_run_is_refused_where_it_runs_once(asked: str) -> None:
    module = Region(ASKED[asked])
    assert_eagers(module, compiled=False)  # which runs it twice
    refusal = r"A reentrant checkpoint asks .*test_reentrant.py:\d+.*use_reentrant=False"
    with pytest.raises(fs.StageError, match=refusal):
        fs.stage_vjp(*stage_of(module, compiled=True), x)
    with pytest.raises(fs.StageError, match=refusal):
        fs.stage_vjp(*stage_of(Passing(ASKED[asked]), compiled=False), x)


@pytest.mark.parametrize("kind", [Region, Passing])
@pytest.mark.parametrize("asked", ASKED)
def test_the_way_out_is_right(asked: str, kind: type[Region]) -> None:
    assert_eagers(kind(ASKED[asked], reentrant=False), compiled=kind is Region)


def _within_no_grad(m: Any, x: Tensor, y: Tensor) -> bool:
    with torch.no_grad():
        return torch.is_grad_enabled() or (y * 2).requires_grad


ANSWERED_ALIKE: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "nothing": lambda m, x, y: 0,
    "of an argument": lambda m, x, y: x.requires_grad + 2 * x.is_leaf,
    "of a parameter": lambda m, x, y: m.linear.weight.requires_grad,
    "what is turned off in the region": _within_no_grad,
    "a library": lambda m, x, y: torch.get_default_dtype().itemsize + m.norm.training,
}


@pytest.mark.parametrize("kind", [Region, Passing])
@pytest.mark.parametrize("asked", ANSWERED_ALIKE)
def test_what_both_runs_are_answered_alike_is_not(asked: str, kind: type[Region]) -> None:
    assert_eagers(kind(ANSWERED_ALIKE[asked]), compiled=kind is Region)
