"""Custom backwards that write into what they read, which a split calls for I and again for W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

import funcstage as fs

ENGINES = ("closures", "aten")


def ahead(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of (x @ w).sum(), computed in the forward as fused losses do."""
    ones = torch.ones(len(x), w.shape[1])
    return ones @ w.t(), x.t() @ ones


class Attributes(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.dx, ctx.dw = ahead(x, w)
        return (x @ w).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.dx.mul_(grad), ctx.dw.mul_(grad)


class List(Attributes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.kept = [*ahead(x, w)]
        return (x @ w).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.kept[0].mul_(grad), ctx.kept[1].mul_(grad)


class Popped(List):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dw, dx = ctx.kept.pop(), ctx.kept.pop()
        return dx * grad, dw * grad


class Dict(Attributes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.kept = {"both": ahead(x, w)}
        return (x @ w).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw = ctx.kept["both"]
        return dx.mul_(grad), dw.mul_(grad)


class Saved(Attributes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(*ahead(x, w))
        return (x @ w).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad)


class SavedUnseen(Saved):
    """As a kernel launch writes: no version is counted."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        for kept in ctx.saved_tensors:
            kept.data.mul_(grad)
        dx, dw = ctx.saved_tensors
        return dx, dw


class Cotangent(Function):
    """As fused norms do: dx is written over the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dw = grad * x
        return grad.mul_(w), dw


class Scaled(Cotangent):
    """What it has written over the cotangent is read again."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grad.mul_(2)
        return grad * w, grad * x


class Scratch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        y = torch.sigmoid(x * w)
        ctx.y = y.clone()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        inner = ctx.y.mul_(1 - ctx.y).mul_(grad)
        return inner * w, inner * x


class Apart(Function):
    """With a setup_context."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x @ w).sum(), *ahead(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dx, ctx.dw = output[1].detach(), output[2].detach()
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return ctx.dx.mul_(grad), ctx.dw.mul_(grad)


class ApartSaved(Apart):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        dx, dw = ctx.saved_tensors
        torch.mul(dx, grad, out=dx)
        dw *= grad
        return dx, dw


class ApartCotangent(Apart):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        grad[...] = 2 * grad
        x, w, *_ = ctx.saved_tensors
        return (grad / 2 * torch.ones(4, 4)) @ w.t(), x.t() @ (grad / 2 * torch.ones(4, 4))


@torch.library.custom_op("funcstage_tests::product_ahead", mutates_args=())
def product_ahead(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x @ w).sum(), *ahead(x, w)


@product_ahead.register_fake
def _(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(()), torch.empty_like(x), torch.empty_like(w)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.dx, ctx.dw = output[1].detach(), output[2].detach()


product_ahead.register_autograd(
    lambda ctx, grad, *_: (ctx.dx.mul_(grad), ctx.dw.mul_(grad)), setup_context=_keep
)


class Operator:
    """With the looks of a function."""

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return product_ahead(x, w)[0]


FUNCTIONS: tuple[Any, ...] = (
    Attributes,
    List,
    Popped,
    Dict,
    Saved,
    SavedUnseen,
    Cotangent,
    Scaled,
    Scratch,
    Apart,
    ApartSaved,
    ApartCotangent,
    Operator,
)


class Stage(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # The cotangent of the function is not one, and is its own.
        y = self.function.apply(self.first(x), self.weight)
        return (y[0] if isinstance(y, tuple) else y) * 3


def assert_split_is_eagers(module: nn.Module, engine: str, *args: Any) -> None:
    x = args[0].clone().requires_grad_()
    y = module(x, *args[1:])
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *module.parameters()], grad.clone())
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, *args)
    torch.testing.assert_close(output, y.detach())
    grads, weight_pullback = pullback(grad)
    torch.testing.assert_close([grads[0], *weight_pullback().values()], [*expected])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_backward_writes_over_for_the_inputs_is_whole_for_the_weights(
    function: Any, engine: str
) -> None:
    assert_split_is_eagers(Stage(function), engine, torch.randn(4, 4))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no fused linear and loss")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("engine", ENGINES)
def test_torchs_fused_linear_and_loss_in_chunks_is_split(engine: str, reduction: str) -> None:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    class Head(nn.Linear):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            options = LinearCrossEntropyOptions()
            return F.linear_cross_entropy(
                x.tanh(), self.weight, target, linear_bias=self.bias, reduction=reduction, options=options
            )

    assert_split_is_eagers(Head(4, 5), engine, torch.randn(6, 4), torch.randint(5, (6,)))


def test_a_backward_that_only_one_half_calls_gets_what_the_forward_left() -> None:
    left: list[int] = []

    class Notes(Attributes):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            left.extend((ctx.dx.data_ptr(), ctx.dw.data_ptr()))
            return Attributes.backward(ctx, grad)

        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            y = Attributes.forward(ctx, x, w)
            left.extend((ctx.dx.data_ptr(), ctx.dw.data_ptr()))
            return y

    class Activations(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Notes.apply(super().forward(x), x.t())

    apply, params, buffers = fs.functionalize(Activations(4, 4))
    pullback = fs.stage_vjp(apply, params, buffers, torch.randn(4, 4))[2]
    pullback()[1]()
    assert len(left) == 4
    assert left[:2] == left[2:]


def test_what_a_backward_keeps_with_a_history_keeps_it() -> None:
    class Adjoint(Function):
        """Keeps a tape from its forward in a list, and goes back over it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            with torch.enable_grad():
                own = [x.detach().requires_grad_(), w.detach().requires_grad_()]
                ctx.tape = [own, (own[0] @ own[1]).tanh()]
            return ctx.tape[1].detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            own, y = ctx.tape
            with torch.enable_grad():
                return torch.autograd.grad(y, own, grad, retain_graph=True)

    assert_split_is_eagers(Stage(Adjoint), "closures", torch.randn(4, 4))
