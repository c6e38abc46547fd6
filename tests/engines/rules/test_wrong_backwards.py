"""Custom functions whose backward returns what no gradient can be: eager's error, on both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import funcstage as fs


class OtherShape(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_ones(7)


class TooFew(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2


class TooMany(OtherShape):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2, grad, None


class NoTensor(OtherShape):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return "a gradient"


class Raises(OtherShape):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ValueError("this function has no gradient")


class Separate(Function):
    """With a setup_context of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ValueError("neither has this one")


class Trailing(OtherShape):
    """Right: torch takes trailing Nones, and sums what was broadcast."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad * 2).expand(5, *grad.shape), None, None


class Unneeded(Function):
    """Right: nobody looks at the gradient of what needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad.new_ones(7)


class Nothing(OtherShape):
    """Right: None is zero."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None


REST: dict[Any, Any] = {TooFew: (2.0,), Unneeded: (torch.ones(1),)}


class Applies(nn.Module):
    def __init__(self, function: Any, to: str) -> None:
        super().__init__()
        self.proj, self.function, self.to = nn.Linear(3, 3), function, to

    def forward(self, x: Tensor) -> Tensor:
        rest = REST.get(self.function, ())
        if self.to == "an activation":
            return self.proj(self.function.apply(x, *rest))
        return nn.functional.linear(x, self.function.apply(self.proj.weight, *rest))


def backward(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    leaf = x.clone().requires_grad_()
    grads = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()], allow_unused=True)
    return [*grads]


def split(module: nn.Module, x: Tensor, compiled: bool) -> list[Tensor | None]:
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    return [dx, *weight_pullback().values()]


EVERYWHERE = pytest.mark.parametrize(
    ("to", "compiled"),
    [(to, compiled) for to in ("an activation", "a weight") for compiled in (False, True)],
)


@EVERYWHERE
@pytest.mark.parametrize("function", [OtherShape, TooFew, TooMany, NoTensor, Raises, Separate])
def test_a_wrong_backward_raises_eagers_error(function: Any, to: str, compiled: bool) -> None:
    module, x = Applies(function, to), torch.randn(2, 3)
    with pytest.raises((RuntimeError, ValueError)) as eager:
        backward(module, x)
    with pytest.raises(eager.type) as found:
        split(module, x, compiled)
    assert str(found.value) == str(eager.value)


@EVERYWHERE
@pytest.mark.parametrize("function", [Trailing, Unneeded, Nothing])
def test_what_eager_takes_is_taken(function: Any, to: str, compiled: bool) -> None:
    module, x = Applies(function, to), torch.randn(2, 3)
    torch.testing.assert_close(split(module, x, compiled), backward(module, x))
