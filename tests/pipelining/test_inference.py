"""What is found out about a stage on fake tensors: what real ones give, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import funcstage as fs
from funcstage._torch import tracing as tt
from funcstage.pipelining.inference import input_grads, run_on_fakes

CPU = torch.device("cpu")


def inferred(module: nn.Module, *args: Any, then: Any = lambda output, inputs: output) -> Any:
    apply, _, buffers = fs.functionalize(module)
    return run_on_fakes(apply, module, (dict(module.named_parameters()), buffers), (args, {}), CPU, then)


class Of(nn.Module):
    """A module whose forward is a function of its linear layer and its input."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self.linear, x)


def same_look(found: Tensor, real: Tensor) -> None:
    assert isinstance(found, tt.FakeTensor)
    for attribute in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(found, attribute) == getattr(real, attribute)


OUTSIDE = torch.randn(4, 4)


@torch.compile(backend="eager", fullgraph=True)
def compiled(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.tanh(linear(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda linear, x: linear(x) @ OUTSIDE,
        lambda linear, x: x.detach() @ OUTSIDE,
        lambda linear, x: linear(x) * x.sum().item(),
        compiled,
    ],
    ids=["reads a tensor outside", "of constants alone", "a value as a factor", "compiled"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_outputs_look_as_those_of_real_tensors(function: Any, mode: Any) -> None:
    module, x = Of(function), torch.randn(3, 4, requires_grad=True)
    with mode():
        found = inferred(module, x)
    same_look(found, module(x))


HALF = torch.randn(4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, y: x @ y,
        lambda x, y: torch.addmm(x, x, y),
        lambda x, y: torch.addmm(y, x, x),
        lambda x, y: torch.bmm(x[None], y[None]),
        lambda x, y: torch.baddbmm(y[None], x[None], x[None]),
        lambda x, y: x @ y[0],
        lambda x, y: torch.addmv(x[0], x, y[0]),
        lambda x, y: torch.dot(x[0], y[0]),
        lambda x, y: functional.conv1d(x[None], y[..., None]),
    ],
    ids=["mm", "addmm", "addmm's summand", "bmm", "baddbmm's summand", "mv", "addmv", "dot", "convolution"],
)
def test_a_product_of_two_dtypes_fails_as_that_of_real_tensors(product: Any) -> None:
    module, x = Of(lambda linear, x: product(linear(x), HALF)), torch.randn(4, 4)
    with pytest.raises(RuntimeError):
        module(x)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        inferred(module, x)


def test_weights_outside_are_cast_for_real_under_the_autocast_around_it() -> None:
    outside = nn.Linear(4, 4)
    module, x = Of(lambda linear, x: outside(linear(x))), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_look(inferred(module, x), module(x))
        assert not isinstance(module(x), tt.FakeTensor)
        before = outside(x)  # whose casts are in autocast's memory
        same_look(inferred(module, x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outside(x), before)


def counting(linear: Any, x: Tensor) -> Tensor:
    linear.calls = getattr(linear, "calls", 0) + 1
    linear.kept = linear(x)
    return linear.kept + linear.calls


def test_nothing_is_left_in_the_module() -> None:
    module = Of(counting)
    before = dict(vars(module.linear))
    inferred(module, torch.randn(3, 4))
    assert vars(module.linear) == before


def shares(linear: nn.Linear, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return linear(xs[0]), xs[1].detach() * 2, xs[3] * 2


@pytest.mark.parametrize("sent", [True, False], ids=["gradients given", "as the outputs"])
def test_gradients_of_inputs_are_those_that_there_are(sent: bool) -> None:
    inputs = tuple(torch.randn(4, requires_grad=i != 2) for i in range(4))
    cotangents = [torch.empty(4, device="meta"), None, torch.empty(4, device="meta")] if sent else []
    found = inferred(Of(shares), inputs, then=input_grads(cotangents, CPU))
    assert [grad if grad is None else tuple(grad.shape) for grad in found] == [(4,), None, None, (4,)]


@pytest.mark.parametrize(
    "function",
    [
        lambda linear, x: x[x > 0],
        lambda linear, x: x if x.sum() > 0 else linear(x),
        lambda linear, x: torch.full((2,), 1.0) if x.isnan().any() else x[:, :1] * linear.bias,
    ],
    ids=["a shape", "a way", "another way"],
)
def test_what_depends_on_values_is_said_to(function: Any) -> None:
    with pytest.raises(tt.UNTRACEABLE):
        inferred(Of(function), torch.randn(3, 4))
