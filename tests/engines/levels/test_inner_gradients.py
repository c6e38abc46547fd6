"""Stages that take gradients inside themselves, against eager autograd of the same module."""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import funcstage as fs
from funcstage._torch.operators import without_torch_function
from funcstage.engines.levels import tape as of_levels
from funcstage.engines.levels.inner_gradients import differentiates
from funcstage.testing import check_stage

ENGINES = pytest.mark.parametrize("engine", ["closures", "aten"])
ARGNUMS = pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])


class Energy(nn.Module):
    """An energy of points, a layer, and what a case makes of them."""

    def __init__(self, case: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.out = nn.Linear(3, 3)
        self.case = case

    def energy(self, x: Tensor) -> Tensor:
        return self.net(x).sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def marked(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.clone().requires_grad_()


def force(s: Energy, x: Tensor) -> Tensor:
    return s.out(torch.func.grad(s.energy)(x))


def force_and_energy(s: Energy, x: Tensor) -> Tensor:
    gradient, value = torch.func.grad_and_value(s.energy)(x)
    return gradient * value + x


def pulled_back(s: Energy, x: Tensor) -> Tensor:
    y, pull = torch.func.vjp(s.net, x)
    return pull(torch.ones_like(y))[0] + y


def not_pulled_back(s: Energy, x: Tensor) -> Tensor:
    return torch.func.vjp(s.net, s.out(x))[0] * x


def jacobian_by_reverse_mode(s: Energy, x: Tensor) -> Tensor:
    return torch.func.jacrev(s.energy)(x) + s.out(x)


def jacobian_by_forward_mode(s: Energy, x: Tensor) -> Tensor:
    return torch.func.jacfwd(s.energy)(x)


def hessian(s: Energy, x: Tensor) -> Tensor:
    return torch.func.hessian(s.energy)(x[0]) @ x[1]


def laplacian(s: Energy, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: torch.func.hessian(s.energy)(row).trace())(x)


def forces_of_each(s: Energy, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(s.energy))(s.out(x))


def mapped_without_gradients(s: Energy, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: s.net(row) * row.sum())(x)


def pushed_forward(s: Energy, x: Tensor) -> Tensor:
    y, tangent = torch.func.jvp(s.net, (s.out(x),), (x.sin(),))
    return y + tangent


def dual_numbers(s: Energy, x: Tensor) -> Tensor:
    with fwAD.dual_level():
        y = fwAD.unpack_dual(s.net(fwAD.make_dual(x, torch.ones_like(x))))
    return y.primal + y.tangent


def gradient_of_marked_input(s: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = marked(x)
        (gradient,) = torch.autograd.grad(s.energy(x), x, create_graph=True)
    return s.out(gradient)


def gradient_as_a_constant(s: Energy, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(s.energy(point), point)
    return s.out(x) * gradient


def gradient_penalty(s: Energy, x: Tensor) -> Tensor:
    hidden = s.out(x)
    (gradient,) = torch.autograd.grad(s.energy(hidden), hidden, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean()


def residual_of_an_equation(s: Energy, x: Tensor) -> Tensor:
    x = marked(x) * 1
    (u,) = torch.autograd.grad(s.energy(x), x, create_graph=True)
    (uu,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return uu + u * x


def gradients_of_parameters(s: Energy, x: Tensor) -> Tensor:
    loss = s.net(x).square().sum()
    return sum(g.square().sum() for g in torch.autograd.grad(loss, [*s.net.parameters()], create_graph=True))


def adapted_weights(s: Energy, x: Tensor) -> Tensor:
    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(s.net, params, (x,)).square().mean()

    params = dict(s.net.named_parameters())
    gradients = torch.func.grad(loss)(params)
    return torch.func.functional_call(s.net, {n: p - 0.1 * gradients[n] for n, p in params.items()}, (x,))


def backward_to_a_tensor_of_its_own(s: Energy, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    s.energy(point).backward(inputs=[point], create_graph=True)
    assert point.grad is not None
    return point.grad * x


def backward_by_function(s: Energy, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    torch.autograd.backward(s.energy(point), inputs=[point], create_graph=True)
    assert point.grad is not None
    return point.grad * x


def backward_that_no_mode_sees(s: Energy, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    energy = s.energy(point)
    with without_torch_function():  # as in the methods of a tensor's class
        energy.backward(inputs=[point], create_graph=True)
    assert point.grad is not None
    return point.grad * x


def old_functional_api(s: Energy, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(s.energy, x, create_graph=True)


def without_grad(s: Energy, x: Tensor) -> Tensor:
    with torch.no_grad():
        gradient = torch.func.grad(s.energy)(x)
    return s.out(x) * gradient


def between_random_draws(s: Energy, x: Tensor) -> Tensor:
    noisy = nn.functional.dropout(s.out(x), 0.5) + torch.rand_like(x)
    return s.out(torch.func.grad(s.energy)(noisy)) * torch.rand_like(x)


def beside_a_checkpoint(s: Energy, x: Tensor) -> Tensor:
    hidden = checkpoint(s.out, x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(s.energy(hidden), hidden, create_graph=True)
    return gradient


def where_errors_are_handled(s: Energy, x: Tensor) -> Tensor:
    try:
        return torch.func.grad(s.energy)(x)
    except Exception:
        return torch.zeros_like(x)


def fixed_point(s: Energy, x: Tensor) -> Tensor:
    """A deep equilibrium layer, whose hook solves for the gradient."""

    def step(z: Tensor) -> Tensor:
        return torch.tanh(0.1 * s.out(z) + x)

    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(20):
            z = step(z)
    z = step(z)
    point = z.clone().detach().requires_grad_()
    again = step(point)

    def hook(grad: Tensor) -> Tensor:
        solution = grad
        for _ in range(20):
            solution = torch.autograd.grad(again, point, solution, retain_graph=True)[0] + grad
        return solution

    z.register_hook(hook)
    return z


def solve(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    for _ in range(3):
        y = y + 0.1 * f(y)
    return y


class Adjoint(Function):
    """As a solver of differential equations takes gradients: by parameters that it was given and captured."""

    @staticmethod
    def forward(ctx: Any, f: Any, y: Tensor, *params: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(y, *params)
        with torch.no_grad():
            return solve(f, y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        y, *params = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return None, *torch.autograd.grad(solve(ctx.f, y), (y, *params), grads, allow_unused=True)


class AdjointWithSetup(Function):
    """The same in torch.func's form, by the module's parameters, and through a helper."""

    @staticmethod
    def forward(f: Any, y: Tensor, *params: Tensor) -> Tensor:
        return solve(f, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.f, y, *_ = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *gradients(ctx.f, *ctx.saved_tensors, grads)


@torch.enable_grad()
def gradients(f: nn.Module, y: Tensor, grads: Any) -> Any:
    y = y.detach().requires_grad_()
    return torch.autograd.grad(solve(f, y), (y, *f.parameters()), grads)


class OwnCheckpoint(Function):
    """Runs a function again and calls backward(), which adds to the parameters' `.grad`, as Megatron does."""

    @staticmethod
    def forward(ctx: Any, f: Any, x: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return f(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.f(x)
        torch.autograd.backward(y, *grads)
        return None, x.grad


class ReadsModule(Function):
    """Takes no gradients, but reads a parameter in its backward."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0] @ ctx.layer.weight, grads[0].t() @ ctx.saved_tensors[0]


def adjoint(s: Energy, x: Tensor) -> Tensor:
    return Adjoint.apply(s.out, x * 2, *s.out.parameters())


def adjoint_with_setup(s: Energy, x: Tensor) -> Tensor:
    return AdjointWithSetup.apply(s.out, x * 2, *s.out.parameters())


def own_checkpoint(s: Energy, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(s.net, s.out(x)) * x


def parameter_read_in_the_backward(s: Energy, x: Tensor) -> Tensor:
    return ReadsModule.apply(s.out, x, s.out.weight)


CASES = [
    force,
    force_and_energy,
    pulled_back,
    not_pulled_back,
    jacobian_by_reverse_mode,
    jacobian_by_forward_mode,
    hessian,
    laplacian,
    forces_of_each,
    mapped_without_gradients,
    pushed_forward,
    dual_numbers,
    gradient_of_marked_input,
    gradient_as_a_constant,
    gradient_penalty,
    residual_of_an_equation,
    gradients_of_parameters,
    adapted_weights,
    backward_to_a_tensor_of_its_own,
    backward_by_function,
    backward_that_no_mode_sees,
    old_functional_api,
    without_grad,
    between_random_draws,
    beside_a_checkpoint,
    where_errors_are_handled,
    fixed_point,
    adjoint,
    adjoint_with_setup,
    own_checkpoint,
    parameter_read_in_the_backward,
]


def made(case: Any) -> tuple[Energy, Tensor]:
    torch.manual_seed(0)
    return Energy(case).double(), torch.randn(2, 3, dtype=torch.float64)


def staged(module: nn.Module, engine: str) -> fs.FunctionalStage:
    stage = fs.functionalize(module)
    return stage if engine == "closures" else stage._replace(apply=fs.compile(stage.apply, backend=engine))


def eager_gradients(module: nn.Module, x: Tensor, argnums: Any) -> tuple[Tensor, Any, dict[str, Any], Tensor]:
    """Output, input gradient, weight gradients and where the generator ends."""
    leaf = x.clone().requires_grad_(argnums is None)
    torch.manual_seed(1)
    output = module(leaf)
    after = torch.get_rng_state()
    module.zero_grad()
    leaf.grad = None
    if output.requires_grad:  # a reentrant checkpoint of what requires none is a constant
        output.backward(torch.ones_like(output))
    return output.detach(), leaf.grad, {name: p.grad for name, p in module.named_parameters()}, after


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], grad)


@pytest.mark.supports(
    "gradients taken inside (`torch.func.grad`, `torch.autograd.grad`, forward duals), adjoint solvers"
)
@ARGNUMS
@ENGINES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_stage_may_take_gradients_inside_itself(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    expected, dx, grads, after = eager_gradients(copy.deepcopy(module), x, argnums)
    apply, params, buffers = staged(module, engine)
    for _ in range(2):  # the second time it is known
        torch.manual_seed(1)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(output, expected)
        (found,), weight_pullback = pullback(torch.ones_like(output))
        assert_same_gradients({"x": found}, {"x": dx})
        assert_same_gradients(weight_pullback(), grads)
    assert all(p.grad is None for p in module.parameters())


@ENGINES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gradients_are_taken_by_the_parameters_given_and_pullbacks_may_be_retained(
    case: Any, engine: str
) -> None:
    module, x = made(case)
    apply, params, buffers = staged(module, engine)
    params = {name: p + 0.3 for name, p in params.items()}
    other = copy.deepcopy(module)
    other.load_state_dict(params)
    expected, dx, grads, _ = eager_gradients(other, x, None)
    torch.manual_seed(1)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    torch.testing.assert_close(output, expected)
    ones = torch.ones_like(output)
    (first,), weights = pullback(ones, retain=True)
    (second,), more_weights = pullback(ones)
    assert_same_gradients({"first": first, "second": second}, {"first": dx, "second": dx})
    for found in (more_weights(), weights(retain=True), weights()):
        assert_same_gradients(found, grads)
    with pytest.raises(fs.ConsumedError):
        weights()


class Flops(TorchDispatchMode):
    """Counts as torch's counter does, without its hooks on modules, which fail under inner gradients."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@ENGINES
@pytest.mark.parametrize("case", [force, gradient_penalty, residual_of_an_equation, adapted_weights])
def test_gradients_inside_cost_what_they_cost_in_eager(case: Any, engine: str) -> None:
    module, x = made(case)
    with Flops() as eager:
        eager_gradients(copy.deepcopy(module), x, None)
    apply, params, buffers = staged(module, engine)
    fs.stage_vjp(apply, params, buffers, x)  # finds out, or traces
    with Flops() as split:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        pullback(torch.ones_like(output))[1]()
    assert split.total == eager.total > 0


@pytest.mark.slow
def test_inductor_computes_gradients_inside() -> None:
    module, x = made(gradient_penalty)
    check_stage(module, x, engines="inductor")


def test_residuals_of_a_stage_that_takes_gradients_can_be_moved() -> None:
    import optree

    module, x = made(gradient_penalty)
    _, dx, grads, _ = eager_gradients(copy.deepcopy(module), x, None)
    _, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
    assert pullback.nbytes > 0
    pullback = optree.tree_map(torch.clone, pullback, namespace="funcstage")
    (found,), weight_pullback = pullback()
    weight_pullback = optree.tree_map(torch.clone, weight_pullback, namespace="funcstage")
    assert_same_gradients({"x": found, **weight_pullback()}, {"x": dx, **grads})


class Counts(nn.Module):
    """Notes its calls in all the ways in which a module may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.seen: list[int] = []
        self.by_name: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.seen.append(self.calls)
        self.by_name[str(self.calls)] = self.calls
        return torch.func.grad(lambda x: self.layer(x).sin().sum())(x)


def test_the_run_that_finds_out_leaves_nothing_behind() -> None:
    module = Counts()
    stage = fs.functionalize(module)
    for n in (1, 2):
        _, buffers, _ = fs.stage_vjp(*stage, torch.randn(2, 3))
        assert (module.calls, buffers["steps"].item()) == (n, 1)
        assert (module.seen, module.by_name) == ([*range(1, n + 1)], {str(i): i for i in range(1, n + 1)})


class Draws(nn.Module):
    """Draws from every generator that all share, before it takes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return drawn * torch.func.grad(lambda x: self.layer(x).sin().sum())(x)


def test_the_run_that_finds_out_draws_nothing() -> None:
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    module, x = Draws(), torch.randn(2, 3)
    seed()
    expected, then = module(x), (random.random(), np.random.rand(), torch.rand(()).item())
    seed()
    found, _, _ = fs.stage_vjp(*fs.functionalize(module), x)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == then


def plain(s: Energy, x: Tensor) -> Tensor:
    return s.out(x)


def checkpointed(s: Energy, x: Tensor) -> Tensor:
    return checkpoint(s.net, checkpoint(s.out, x, use_reentrant=False), use_reentrant=True)


def marked_for_checkpoints(s: Energy, x: Tensor) -> Tensor:
    return checkpoint(s.net, s.out(x).detach().requires_grad_(), use_reentrant=True)


def hooked(s: Energy, x: Tensor) -> Tensor:
    y = s.out(x)
    y.register_hook(lambda grad: grad * 2)
    return y


@pytest.mark.parametrize(
    "case",
    [
        plain,
        checkpointed,
        marked_for_checkpoints,
        hooked,
        mapped_without_gradients,
        parameter_read_in_the_backward,
    ],
)
def test_a_stage_that_takes_no_gradients_keeps_to_the_levels(case: Any) -> None:
    module, x = made(case)
    pullback = fs.stage_vjp(*fs.functionalize(module), x)[2]
    assert isinstance(pullback._tape, of_levels.InputTape)


def backward_to_all(s: Energy, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    s.energy(point).backward(create_graph=True)
    assert point.grad is not None
    return point.grad * x


def writes_beside_a_gradient(s: Energy, x: Tensor) -> Tensor:
    gradient = torch.func.grad(s.energy)(x)
    with torch.no_grad():
        s.out.weight.view(-1)[0:1].add_(1)
    return s.out(gradient)


def overwrites_its_input(s: Energy, x: Tensor) -> Tensor:
    return torch.func.grad(s.energy)(x) + x.mul_(2)


@pytest.mark.filterwarnings("ignore:Using backward")
@ARGNUMS
@ENGINES
@pytest.mark.parametrize("case", [backward_to_all, writes_beside_a_gradient])
def test_writes_beside_a_gradient_are_refused_and_do_not_happen(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    apply, params, buffers = staged(module, engine)
    before = {name: p.clone() for name, p in params.items()}
    for _ in range(2):
        with pytest.raises(fs.PurityError):
            fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    assert_same_gradients(params, before)
    assert all(p.grad is None for p in module.parameters())


@ARGNUMS
def test_an_input_overwritten_beside_a_gradient_is_refused(argnums: Any) -> None:
    module, x = made(overwrites_its_input)
    before = x.clone()
    with pytest.raises(fs.PurityError):
        fs.stage_vjp(*fs.functionalize(module), x, argnums=argnums)
    assert torch.equal(x, before)


def gradients_of(apply: Any, params: Any, x: Tensor) -> Tensor:
    output, _, pullback = fs.stage_vjp(apply, params, {}, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    grads = [dx, *weight_pullback().values()]
    return sum((g.square().sum() for g in grads if g is not None), torch.zeros((), dtype=x.dtype))


@pytest.mark.parametrize(
    "case", [force, hessian, forces_of_each, adapted_weights, gradient_penalty, dual_numbers]
)
def test_gradients_around_gradients_inside_are_right_or_refused(case: Any) -> None:
    module, x = made(case)
    apply, params, _ = fs.functionalize(module)
    marked_params = {name: p.clone().requires_grad_() for name, p in params.items()}

    def eager(params: dict[str, Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        output = torch.func.functional_call(module, params, (leaf,))
        leaves = [leaf, *params.values()]
        grads = torch.autograd.grad(
            output, leaves, torch.ones_like(output), create_graph=True, allow_unused=True
        )
        return sum((g.square().sum() for g in grads if g is not None), torch.zeros((), dtype=x.dtype))

    expected = torch.autograd.grad(eager(marked_params), [*marked_params.values()], allow_unused=True)
    if case in (gradient_penalty, dual_numbers):
        with pytest.raises(fs.StageError, match="differentiated in turn"):
            gradients_of(apply, marked_params, x)
    else:
        found = torch.autograd.grad(
            gradients_of(apply, marked_params, x), [*marked_params.values()], allow_unused=True
        )
        names = [*params]
        assert_same_gradients(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))
    with pytest.raises(fs.StageError, match="differentiated in turn"):
        torch.func.grad(lambda params: gradients_of(apply, params, x))(params)


HELPERS = [gradients]


class HiddenAdjoint(AdjointWithSetup):
    """Gradients behind what no look at the code of the backward can find."""

    @staticmethod
    def forward(ctx: Any, f: Any, y: Tensor, *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.f = f
        ctx.save_for_backward(y)
        return solve(f, y)

    setup_context = Function.setup_context

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *HELPERS[0](ctx.f, *ctx.saved_tensors, grads)


def test_gradients_that_f_could_not_foresee_are_refused_with_the_way_out() -> None:
    module, x = made(lambda s, x: HiddenAdjoint.apply(s.out, x * 2, *s.out.parameters()))
    stage = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(*stage, x)
    with pytest.raises(fs.StageError, match=r"torch.enable_grad.*funcstage.compile"):
        pullback(torch.ones_like(output))
    _, dx, grads, _ = eager_gradients(copy.deepcopy(module), x, None)
    compiled = staged(module, "aten")
    output, _, pullback = fs.stage_vjp(*compiled, x)
    (found,), weight_pullback = pullback(torch.ones_like(output))
    assert_same_gradients({"x": found, **weight_pullback()}, {"x": dx, **grads})


def cond(s: Energy, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: s.out(x), lambda x: s.net(x) * x, (x,))


def while_loop(s: Energy, x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    step = lambda i, y: (i + 1, s.out(y))  # noqa: E731
    return while_loop(lambda i, y: i < 3, step, (torch.tensor(0), x))[1]  # type: ignore[no-any-return]


def scan(s: Energy, x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda c, row: (c + s.out(row), c * row), x[0].clone(), x)[1]  # type: ignore[no-any-return]


def cond_beside_a_gradient(s: Energy, x: Tensor) -> Tensor:
    return cond(s, torch.func.grad(s.energy)(x))


def mapped(s: Energy, x: Tensor) -> Tensor:
    from torch._higher_order_ops.map import map

    return map(lambda row, weight: (row @ weight,), x, s.out.weight)[0]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.supports("`torch.cond`, `map`, `scan`", "refused: plain Python", "from torch 2.14 on")
@ARGNUMS
@pytest.mark.parametrize("case", [cond, mapped, scan, cond_beside_a_gradient])
def test_compiled_stages_have_control_flow_operators(case: Any, argnums: Any) -> None:
    module, x = made(case)
    apply, params, buffers = staged(module, "aten")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14) and case is not mapped:
        with pytest.raises(fs.TraceError, match=r"higher-order operator.*plain Python"):
            fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        return
    for x in (x.abs(), -x.abs()):  # noqa: B020
        expected, dx, grads, _ = eager_gradients(copy.deepcopy(module), x, argnums)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        (found,), weight_pullback = pullback(torch.ones_like(output))
        torch.testing.assert_close(output, expected)
        assert_same_gradients({"x": found, **weight_pullback()}, {"x": dx, **grads})


@ARGNUMS
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        (cond, "closures"),
        (mapped, "closures"),
        (scan, "closures"),
        (cond_beside_a_gradient, "closures"),
        (while_loop, "closures"),
        (while_loop, "aten"),
    ],
)
def test_control_flow_operators_are_refused_by_name(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    name = {mapped: "map", cond_beside_a_gradient: "cond"}.get(case, case.__name__)
    apply, params, buffers = staged(module, engine)
    for _ in range(2):
        with pytest.raises(fs.StageError, match=f"higher-order operator {name}.*plain Python"):
            fs.stage_vjp(apply, params, buffers, x, argnums=argnums)


def test_a_keyword_argument_with_a_history_is_a_constant_beside_gradients_taken_inside() -> None:
    class Penalised(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return torch.func.grad(lambda x: (super(Penalised, self).forward(x) ** 2).sum())(x) * scale

    module, x = Penalised(3, 3), torch.randn(2, 3)
    scale = torch.ones(3, requires_grad=True)
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, scale=scale)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_()
    module(leaf, scale.detach()).sum().backward()
    torch.testing.assert_close(dx, leaf.grad)
    torch.testing.assert_close(weight_pullback()["weight"], module.weight.grad)


def plain(grad: Tensor, other: Any = None) -> Tensor:
    return grad * 2


def recording(grad: Tensor, other: Any = None) -> Tensor:
    with torch.enable_grad():
        return grad * 2


class Searched:
    """Holds methods that are searched."""

    def recording(self, grad: Tensor) -> Tensor:
        return recording(grad)

    def plain(self, grad: Tensor) -> Tensor:
        return plain(grad)


def closing_over(function: Any) -> Any:
    return lambda grad: function(grad)


HOOKS: dict[str, tuple[Any, bool]] = {
    "plain": (plain, False),
    "recording": (recording, True),
    "by a global name": (lambda grad: recording(grad), True),
    "of a global that is plain": (lambda grad: plain(grad), False),
    "in a function within": (lambda grad: (lambda: torch.autograd.grad(grad, grad))(), True),
    "a partial": (functools.partial(recording, other=1), True),
    "a partial that is plain": (functools.partial(plain, other=1), False),
    "a method": (Searched().recording, True),
    "a method that is plain": (Searched().plain, False),
    "closed over": (closing_over(recording), True),
    "closed over and plain": (closing_over(plain), False),
    "a partial closed over": (closing_over(functools.partial(recording, other=1)), True),
    "decorated": (torch.enable_grad()(plain), True),
    "decorated otherwise": (torch.no_grad()(plain), False),
    "torch's": (torch.nn.functional.relu, False),
    "no function": (1, False),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_refers_to_is_searched_for_gradients(hook: str) -> None:
    function, expected = HOOKS[hook]
    assert differentiates(function) is expected


def test_a_hook_that_belongs_to_no_module_is_searched_like_any_other() -> None:
    for hook, expected in ((plain, False), (recording, True)):
        copy = types.FunctionType(hook.__code__, hook.__globals__)
        copy.__module__ = None  # type: ignore[assignment]  # as of functions that code has made
        assert differentiates(copy) is expected


def test_a_hook_on_a_node_may_take_gradients_by_what_is_marked_after_it() -> None:
    solver: Any = sys.modules["torch." + "autograd"]  # by no name that tells

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        y = x * params
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(
            lambda grads: tuple(g + solver.grad(again, point, g, retain_graph=True)[0] for g in grads)
        )
        point = x.detach().clone().requires_grad_()
        again = (point * params).sin()
        return y, buffers

    params, x, grad = (torch.randn(3) for _ in range(3))
    leaves = x.clone().requires_grad_(), params.clone().requires_grad_()
    expected = torch.autograd.grad(apply(leaves[1], (), leaves[0])[0], leaves, grad)
    (dx,), weight_pullback = fs.stage_vjp(apply, params, (), x)[2](grad)
    torch.testing.assert_close((dx, weight_pullback()), expected)
