"""`vmap`, `jvp` and higher derivatives around a stage, against torch.func on its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])


class Net(nn.Module):
    """Two layers that share a weight, and a norm.

    The norm has no weights: torch.func's second derivatives by the weights of a layer norm differ from finite
    differences (2.13), those through a stage do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.first(self.first(x)))).square().sum(-1)


def stage(compiled: bool) -> tuple[Any, dict[str, Tensor], Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    module = Net().double()
    apply, params, _ = fs.functionalize(module)
    x = torch.randn(4, 3, dtype=torch.float64)
    return fs.compile(apply, backend="aten") if compiled else apply, params, {}, module, x


def loss(module: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(module, params, x).sum()


@ENGINES
def test_vmap_over_a_split_gives_the_gradients_of_every_example(compiled: bool) -> None:
    apply, params, buffers, module, x = stage(compiled)

    def grads(row: Tensor) -> tuple[Tensor, Any]:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, row)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return dx, weight_pullback()

    dx, per_example = torch.func.vmap(grads)(x)
    for i, row in enumerate(x):
        expected = torch.func.grad(loss, argnums=(1, 2))(module, params, row)
        torch.testing.assert_close(({n: g[i] for n, g in per_example.items()}, dx[i]), expected)


@ENGINES
def test_jvp_goes_through_a_split(compiled: bool) -> None:
    apply, params, buffers, module, x = stage(compiled)
    direction = {name: torch.randn_like(value) for name, value in params.items()}

    def split(params: dict[str, Tensor]) -> tuple[Tensor, Any]:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return dx, weight_pullback()

    def whole(params: dict[str, Tensor]) -> tuple[Tensor, Any]:
        grads, dx = torch.func.grad(loss, argnums=(1, 2))(module, params, x)
        return dx, grads

    torch.testing.assert_close(
        torch.func.jvp(split, (params,), (direction,)), torch.func.jvp(whole, (params,), (direction,))
    )


@ENGINES
def test_the_jacobian_of_a_splits_gradients_is_the_hessian(compiled: bool) -> None:
    apply, params, buffers, module, x = stage(compiled)

    def grads(params: dict[str, Tensor]) -> Any:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        return pullback(torch.ones_like(output))[1]()

    expected = torch.func.hessian(lambda params: loss(module, params, x))(params)
    torch.testing.assert_close(torch.func.jacrev(grads)(params), expected)
    torch.testing.assert_close(torch.func.jacfwd(grads)(params), expected)


@ENGINES
def test_a_stage_function_itself_may_be_transformed(compiled: bool) -> None:
    apply, params, buffers, module, x = stage(compiled)
    found = torch.func.hessian(lambda params: apply(params, buffers, x)[0].sum())(params)
    torch.testing.assert_close(found, torch.func.hessian(lambda params: loss(module, params, x))(params))
