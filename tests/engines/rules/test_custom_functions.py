"""Custom autograd functions and operators: split where they can be, with torch's own semantics of `ctx`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import funcstage as fs

CALLS: list[tuple[bool, ...]] = []


class Scaled(Function):
    """tanh(x @ w) * scale, and where the product is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        hidden = x @ w
        ctx.save_for_backward(x, w, hidden)
        ctx.scale = scale
        positive = hidden > 0
        ctx.mark_non_differentiable(positive)
        return torch.tanh(hidden) * scale, positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, hidden = ctx.saved_tensors
        CALLS.append(ctx.needs_input_grad)
        of_hidden = grad * ctx.scale * (1 - torch.tanh(hidden) ** 2)
        dx = of_hidden @ w.t() if ctx.needs_input_grad[0] else None
        return dx, x.t() @ of_hidden if ctx.needs_input_grad[1] else None, None


class ScaledApart(Function):
    """The same with a setup_context of its own."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        hidden = x @ w
        return torch.tanh(hidden) * scale, hidden > 0, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(x, w, output[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        return Scaled.backward(ctx, grad, grad)


class ThroughMemory(Function):
    """Reads memory directly, as hand-written kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.numpy() * np.sin(w.numpy()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = (t.numpy() for t in ctx.saved_tensors)
        dw = (grad.numpy() * x * np.cos(w)).sum(0)
        return torch.from_numpy(grad.numpy() * np.sin(w)), torch.from_numpy(dw)


class Overwriting(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Lazy(Function):
    """Tells which of its cotangents are absent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.clone(), x * 2

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        CALLS.append((first is None, second is None))
        if second is None:
            return first
        return second * 2 if first is None else first + second * 2


class Keeping(Function):
    """Keeps tensors as attributes, and lets go of them in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.kept = (x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.kept
        ctx.kept = None
        return grad * w, (grad * x).sum(0)


class Wanting(Function):
    """Decides in the forward what it will need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w if ctx.needs_input_grad[0] else None, x if ctx.needs_input_grad[1] else None)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, x = ctx.saved_tensors
        return None if w is None else grad * w, None if x is None else (grad * x).sum(0)


@torch.library.custom_op("funcstage_tests::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.tanh(x @ w) * scale, x @ w


@scaled.register_fake
def _(x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x @ w, x @ w


@torch.library.custom_op("funcstage_tests::scaled_backward", mutates_args=())
def scaled_backward(grad: Tensor, hidden: Tensor, other: Tensor, scale: float, left: bool) -> Tensor:
    of_hidden = grad * scale * (1 - torch.tanh(hidden) ** 2)
    return of_hidden @ other.t() if left else other.t() @ of_hidden


@scaled_backward.register_fake
def _(grad: Tensor, hidden: Tensor, other: Tensor, scale: float, left: bool) -> Tensor:
    return (
        grad.new_empty(grad.shape[0], other.shape[0])
        if left
        else grad.new_empty(other.shape[1], grad.shape[1])
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w, ctx.scale = inputs
    ctx.save_for_backward(x, w, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, hidden = ctx.saved_tensors
    CALLS.append(ctx.needs_input_grad)
    wants_x, wants_w, _ = ctx.needs_input_grad
    return (
        scaled_backward(grad, hidden, w, ctx.scale, True) if wants_x else None,
        scaled_backward(grad, hidden, x, ctx.scale, False) if wants_w else None,
        None,
    )


scaled.register_autograd(_backward, setup_context=_setup)


class Layers(nn.Module):
    """Activations, parameters and derived parameters, each as either operand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.other = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.first(x), self.weight)
        x = self.function(x, self.weight.t() * self.other)
        return x @ self.function(self.other, self.weight)


def scaled_pair(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(x: Tensor, w: Tensor) -> Tensor:
        y, positive = function(x, w, 2.0)[:2]
        return y + 0 * positive

    return apply


def row(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: function(x, w[0].contiguous())


FUNCTIONS = {
    "ctx": scaled_pair(lambda *args: Scaled.apply(*args)),
    "setup_context": scaled_pair(lambda *args: ScaledApart.apply(*args)),
    "attributes": row(lambda *args: Keeping.apply(*args)),
    "needs_input_grad in the forward": row(lambda *args: Wanting.apply(*args)),
    "overwriting": lambda x, w: Overwriting.apply(x @ w),
    "absent cotangents": lambda x, w: Lazy.apply(x * w[0])[1] + Lazy.apply(x)[0],
    "custom_op": scaled_pair(scaled),
}
IN_MEMORY = {"numpy": row(lambda *args: ThroughMemory.apply(*args))}


@pytest.mark.supports("`torch.autograd.Function`, with `ctx` or `setup_context`; `torch.library.custom_op`")
@pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])
@pytest.mark.parametrize(
    ("engine", "name"),
    [("closures", name) for name in (*FUNCTIONS, *IN_MEMORY)] + [("aten", name) for name in FUNCTIONS],
)
def test_gradients_are_eagers(engine: str, name: str, argnums: Any) -> None:
    torch.manual_seed(0)
    module = Layers((FUNCTIONS | IN_MEMORY)[name]).double()
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_(argnums is None)
    expected = module(leaf)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    function = apply if engine == "closures" else fs.compile(apply, backend="aten")
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(function, params, buffers, x, argnums=argnums)
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
        torch.testing.assert_close(output, expected)
        assert (dx is None) == (argnums == ())
        if dx is not None:
            torch.testing.assert_close(dx, leaf.grad)
        torch.testing.assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


@pytest.mark.parametrize(
    "function",
    [lambda *args: Scaled.apply(*args), lambda *args: ScaledApart.apply(*args), scaled],
    ids=["ctx", "setup_context", "custom_op"],
)
def test_i_asks_for_activations_and_w_for_weights(function: Any) -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return function(x, params, 2.0)[0], buffers

    params, x = torch.randn(4, 4), torch.randn(3, 4)
    output, _, pullback = fs.stage_vjp(apply, params, (), x)
    CALLS.clear()
    _, weight_pullback = pullback(torch.ones_like(output))
    assert [call[:2] for call in CALLS] == [(True, False)]
    weight_pullback()
    assert [call[:2] for call in CALLS] == [(True, False), (False, True)]


def test_an_apply_that_was_bound_before_is_found_where_torch_has_it_in_python() -> None:
    bound = Keeping.apply
    params, x = torch.randn(4), torch.randn(3, 4)

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return bound(x, params), buffers

    if isinstance(Function.__dict__["apply"], classmethod):
        output, _, pullback = fs.stage_vjp(apply, params, (), x)
        torch.testing.assert_close(pullback(torch.ones_like(output))[1](), x.sum(0))
    else:
        with pytest.raises(fs.StageError, match=r"Write `MyFunction.apply\(...\)` in the stage"):
            fs.stage_vjp(apply, params, (), x)


def test_cotangents_that_are_absent_are_told_so() -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return Lazy.apply(x * params)[1].sin(), buffers

    x, params = torch.randn(3), torch.randn(3)
    output, _, pullback = fs.stage_vjp(apply, params, (), x)
    CALLS.clear()
    pullback(torch.ones_like(output))[1]()
    assert set(CALLS) == {(True, False)}


def test_saved_tensors_are_residuals_and_are_freed() -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return Scaled.apply(x, params, 2.0)[0], buffers

    params, x = torch.randn(64, 64), torch.randn(128, 64)
    output, _, pullback = fs.stage_vjp(apply, params, (), x)
    held = pullback.nbytes
    assert 2 * x.nbytes <= held <= 3 * x.nbytes  # the input and the product; the weight is not counted
    pullback(torch.ones_like(output))[1]()
    assert pullback.nbytes == 0


def test_second_derivatives_are_eagers() -> None:
    params = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return ThroughWeights.apply(x, params), buffers

    output, _, pullback = fs.stage_vjp(apply, params, (), x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    found = torch.autograd.grad((dx.square().sum() + weight_pullback().square().sum()), [x, params])
    grads = torch.autograd.grad(ThroughWeights.apply(x, params).sum(), [x, params], create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, params])
    torch.testing.assert_close(found, expected)


class ThroughWeights(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w) ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        of_product = 2 * grad * (x @ w)
        return of_product @ w.t(), x.t() @ of_product


def test_vmap_over_a_function_with_ctx_is_refused_by_its_name() -> None:
    def outputs(x: Tensor) -> Tensor:
        return fs.stage_vjp(lambda p, b, x: (Keeping.apply(x, p), b), torch.ones(3), (), x)[0]

    with pytest.raises(fs.StageError, match=r"Keeping, whose forward takes `ctx`.*setup_context"):
        torch.func.vmap(outputs)(torch.ones(2, 4, 3))


@pytest.mark.supports(
    "functions that read memory themselves (NumPy, a raw kernel launch)",
    compiled="refused: make it an operator",
)
def test_what_reads_memory_cannot_be_traced_and_the_refusal_says_so() -> None:
    apply, params, buffers = fs.functionalize(Layers(IN_MEMORY["numpy"]))
    with pytest.raises(fs.StageError, match=r"cannot be traced.*uncompiled `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(3, 4))


@torch.library.custom_op("funcstage_tests::total", mutates_args=())
def total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


@total.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return torch.empty_like(tensors[0])


total.register_autograd(lambda ctx, grad: [grad] * 2, setup_context=lambda ctx, inputs, output: None)


@pytest.mark.supports(
    "operators over lists of tensors with a gradient of their own", uncompiled="refused: tensors one by one"
)
def test_an_operator_over_lists_of_tensors_is_refused_by_name_and_compiled() -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return total([x * params, params]), buffers

    bound_early = not isinstance(Function.__dict__["apply"], classmethod)  # by torch itself, see above
    with pytest.raises(fs.StageError, match="apply" if bound_early else r"funcstage_tests_total.*one by one"):
        fs.stage_vjp(apply, torch.ones(3), (), torch.ones(3))
    _, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), torch.ones(3), (), torch.full((3,), 2.0))
    (dx,), weight_pullback = pullback(torch.ones(3))
    assert torch.equal(dx, torch.ones(3))
    assert torch.equal(weight_pullback(), torch.full((3,), 3.0))
