"""Functions compiled by torch.compile inside of stages: both engines split what they were made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs


class Parts(nn.Module):
    """A compiled module, a compiled function and a compiled method."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="aot_eager")
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.last = nn.Linear(4, 4)
        self.last.forward = torch.compile(self.last.forward, backend="eager")
        self.middle = torch.compile(lambda x, w: torch.sin(x @ w), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), self.weight))


@pytest.mark.supports("functions compiled by `torch.compile`", "as written", "as written")
@pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_gradients_are_eagers(engine: str, argnums: Any) -> None:
    torch.manual_seed(0)
    module = Parts().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    apply, params, buffers = fs.functionalize(module)
    function = apply if engine == "closures" else fs.compile(apply, backend="aten")
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(function, params, buffers, x, argnums=argnums)
        (dx,), weight_pullback = pullback(cotangent)
        torch.testing.assert_close(output, expected)
        assert dx is None if argnums == () else torch.allclose(dx, leaf.grad, rtol=1e-12)
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        torch.testing.assert_close(weight_pullback(), grads)
    torch.testing.assert_close(module(x), expected)  # and they are compiled again outside


@pytest.mark.parametrize("backend", [None, "aten"])
def test_a_module_that_is_compiled_as_a_whole_is_split_as_it_was_written(backend: str | None) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    apply, params, buffers = fs.functionalize(torch.compile(module, backend="eager"))
    stage = fs.compile(apply, backend=backend) if backend else apply
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    _, grads = fs.stage_backward(pullback, torch.ones_like(output))
    module(x).sum().backward()
    torch.testing.assert_close(list(grads.values()), [p.grad for p in module.parameters()])
