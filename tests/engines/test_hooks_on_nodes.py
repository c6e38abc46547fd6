"""Hooks that a forward puts on nodes, by `grad_fn.register_hook`: as in eager, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import funcstage as fs

ENGINES = ("levels", "tape", "aten")
Grads = Sequence[Tensor | None]
Hook = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
"""What is hooked: an operation on parameters, one on a derived one, one on none, and a derived parameter."""


def thrice(grads: Grads, *_: Any) -> Grads:
    """A hook, before or after a node."""
    return tuple(None if grad is None else grad * 3 for grad in grads)


class Hooking(nn.Module):
    """Hooks nodes of its tape; takes gradients inside if it is to be split on a plain tape."""

    def __init__(self, hook: Hook, engine: str) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.w = nn.Parameter(torch.randn(4))
        self.hook, self.engine = hook, engine

    def forward(self, x: Tensor) -> Tensor:
        if self.engine == "tape":
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(leaf.sum(), leaf)
        y = self.first(x)
        w = torch.exp(self.w)
        z = self.norm(torch.sin(y)) * w
        u = torch.sin(z)
        scale = self.hook(y, z, u, w)
        return self.last(u * (scale if isinstance(scale, float) else 1.0))


def compared(hook: Hook, engine: str) -> None:
    """Compare with eager."""
    torch.manual_seed(0)
    module, x = Hooking(hook, engine).double(), torch.randn(3, 4, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()], allow_unused=True)
    for found, expected in zip(gradients(module, x), wanted, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def gradients(module: Hooking, x: Tensor) -> list[Tensor | None]:
    apply, params, buffers = fs.functionalize(module)
    if module.engine == "aten":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    return [dx, *weight_pullback().values()]


def node_of(tensor: Tensor) -> Any:
    return tensor.grad_fn


HONOURED: dict[str, Hook] = {
    "before an operation on parameters": lambda y, z, u, w: node_of(y).register_prehook(thrice),
    "before one on a derived parameter": lambda y, z, u, w: node_of(z).register_prehook(thrice),
    "before another": lambda y, z, u, w: node_of(u).register_prehook(thrice),
    "after another": lambda y, z, u, w: node_of(u).register_hook(thrice),
    "before one on parameters alone": lambda y, z, u, w: node_of(w).register_prehook(thrice),
    "after one on parameters alone": lambda y, z, u, w: node_of(w).register_hook(thrice),
    "after one that no gradient comes to": lambda y, z, u, w: node_of(z.sin()).register_hook(thrice),
    "by its edge": lambda y, z, u, w: get_gradient_edge(y).node.register_prehook(thrice),
    "one that was removed": lambda y, z, u, w: node_of(y).register_hook(thrice).remove(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hook", HONOURED)
def test_a_hook_on_a_node_does_what_it_does_in_eager(hook: str, engine: str) -> None:
    compared(HONOURED[hook], engine)


READ: dict[str, Hook] = {
    "its name": lambda y, z, u, w: 2.0 if node_of(y).name() == "AddmmBackward0" else 5.0,
    "what comes before it": lambda y, z, u, w: float(len(node_of(y).next_functions)),
    "whether it is there": lambda y, z, u, w: 2.0 if node_of(y) is None else 5.0,
    "that it is the same": lambda y, z, u, w: 2.0 if node_of(y) is y.grad_fn else 5.0,
    "a note on it": lambda y, z, u, w: float(node_of(y).metadata.setdefault("note", 7.0)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("read", READ)
def test_what_a_node_tells_is_as_in_eager(read: str, engine: str) -> None:
    compared(READ[read], engine)


DIVIDED: dict[str, Hook] = {
    "on parameters": lambda y, z, u, w: node_of(y).register_hook(thrice),
    "on a derived parameter": lambda y, z, u, w: node_of(z).register_hook(thrice),
    "reached by the node after it": lambda y, z, u, w: node_of(u).next_functions[0][0].register_hook(thrice),
}


@pytest.mark.parametrize("engine", ["levels", "tape"])
@pytest.mark.parametrize("hook", DIVIDED)
def test_a_hook_after_an_operation_is_refused_where_i_and_w_share_it(hook: str, engine: str) -> None:
    with pytest.raises(
        fs.StageError, match=r"Hooking hooks \w+, a node of its tape \(thrice, .* register_hook"
    ):
        gradients(Hooking(DIVIDED[hook], engine), torch.randn(3, 4))


@pytest.mark.parametrize("hook", DIVIDED)
def test_a_trace_runs_such_a_hook_as_eager_does(hook: str) -> None:
    compared(DIVIDED[hook], "aten")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_way_out_of_that_refusal_works(engine: str) -> None:
    def on_tensors(y: Tensor, z: Tensor, u: Tensor, w: Tensor) -> None:
        y.register_hook(lambda grad: grad * 3)
        z.register_hook(lambda grad: grad * 5)

    compared(on_tensors, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_on_the_accumulator_of_a_parameter_is_refused(engine: str) -> None:
    def hook(y: Tensor, z: Tensor, u: Tensor, w: Tensor) -> None:
        node_of(w).next_functions[0][0].register_prehook(thrice)

    with pytest.raises(fs.StageError, match="a node of its tape"):
        gradients(Hooking(hook, engine), torch.randn(3, 4))


def test_a_hook_in_a_checkpointed_region_is_refused_in_f() -> None:
    class Region(Hooking):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    module = Region(DIVIDED["on parameters"], "levels")
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(fs.StageError, match="a node of its tape"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))


def test_backward_hooks_of_modules_are_no_hooks_of_the_stages_on_nodes() -> None:
    module = Hooking(lambda *_: None, "levels").double()
    module.norm.register_full_backward_hook(lambda _, gi, go: (gi[0] * 3,))
    x = torch.randn(3, 4, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])
    torch.testing.assert_close(gradients(module, x), [*wanted])


def test_the_verbs_on_an_eager_tape_run_hooks_of_nodes_in_i_and_in_w() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    output = linear(x)
    node_of(output).register_hook(thrice)
    wanted = torch.autograd.grad(output.sum(), [x, *linear.parameters()], retain_graph=True)
    (dx,), groups = fs.autograd.stage_backward_input([output], [torch.ones(3, 4)], [x], linear.parameters())
    found = fs.autograd.stage_backward_weight(linear.parameters(), groups)
    torch.testing.assert_close([dx, *found], [*wanted])
