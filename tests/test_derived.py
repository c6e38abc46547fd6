"""Mixed precision: autocast around and inside a stage, and float32 parameters computed with in 16 bits."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.distributed as dist
from pipeline_cases import V_SHAPED
from pipeline_ranks import run
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.testing import check_stage

aten = functools.partial(fs.compile, backend="aten")
ENGINES = pytest.mark.parametrize("engine", [None, aten], ids=["closures", "aten"])
LOW = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


class Mixed(nn.Module):
    """Products, a norm, attention, and a weight that is used twice; parts of it set autocast themselves."""

    def __init__(
        self, inside: Callable[[], Any] = nullcontext, inner: Callable[[], Any] = nullcontext
    ) -> None:
        super().__init__()
        self.inside = inside
        self.inner = inner
        self.up = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        with self.inside():
            y = F.gelu(self.up(x))
            y = F.scaled_dot_product_attention(y, y, self.norm(y).to(y.dtype))
            with self.inner():
                z = (y.float() @ self.down.weight) * self.scale
            return self.down(z) + F.linear(y, self.up.weight.t())


def autocast(low: torch.dtype, cache: bool = True) -> Callable[[], Any]:
    return functools.partial(torch.autocast, "cpu", dtype=low, cache_enabled=cache)


def off() -> Any:
    return torch.autocast("cpu", enabled=False)


def same() -> Any:
    """A context in which nothing changes."""
    return nullcontext()


REGIONS = {
    "around": (lambda on: on, lambda on: same, same),
    "inside": (lambda on: same, lambda on: on, same),
    "around and inside": (lambda on: on, lambda on: on, same),
    "around, off in a region": (lambda on: on, lambda on: same, off),
    "inside, off in a region": (lambda on: same, lambda on: on, off),
    "off around, on inside": (lambda on: off, lambda on: on, same),
}


@pytest.mark.supports("autocast, around the stage or inside")
@ENGINES
@pytest.mark.parametrize(
    ("low", "cache"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
    ids=["bfloat16", "bfloat16, no cache", "float16"],
)
@pytest.mark.parametrize("where", REGIONS)
def test_autocast_is_that_of_eager_wherever_it_is_set(
    where: str, cache: bool, low: torch.dtype, engine: Any
) -> None:
    torch.manual_seed(0)
    around, inside, inner = REGIONS[where]
    on = autocast(low, cache)
    module = Mixed(inside(on), inner)
    x = torch.randn(3, 5, 8)
    with around(on)():
        check_stage(module, x, engines=engine or "closures")


@ENGINES
@LOW
@pytest.mark.parametrize("where", REGIONS)
def test_gradients_under_autocast_are_no_further_from_the_exact_ones_than_eagers(
    where: str, low: torch.dtype, engine: Any
) -> None:
    torch.manual_seed(0)
    around, inside, inner = REGIONS[where]
    on = autocast(low)
    module = Mixed(inside(on), inner)
    x, cotangent = torch.randn(2, 3, 5, 8)
    exact = gradients(WithoutCasts(module), x.double(), cotangent.double())
    with around(on)():
        eager = gradients(copy.deepcopy(module), x, cotangent)
        apply, params, buffers = fs.functionalize(module)
        output, _, pullback = fs.stage_vjp(engine(apply) if engine else apply, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent.to(output.dtype))
        ours = {"x": dx, **weight_pullback()}
    assert ours.keys() == eager.keys()
    for name, grad in ours.items():
        assert grad.dtype == eager[name].dtype == torch.float32
        error, eagers = (float((g.double() - exact[name]).norm()) for g in (grad, eager[name]))
        assert error <= 1.5 * eagers + 1e-6 * float(exact[name].norm()), f"{name}: {error} against {eagers}"


def test_pullbacks_may_run_after_the_autocast_region_ended() -> None:
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(3, 5, 8)
    cotangent = torch.randn(3, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apply, params, buffers = fs.functionalize(module)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        reference = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        eager = reference(leaf)
    eager.backward(cotangent.to(eager.dtype))
    (dx,), weight_pullback = pullback(cotangent.to(output.dtype))
    torch.testing.assert_close(dx, leaf.grad, rtol=0, atol=0)
    for name, grad in weight_pullback().items():
        expected = reference.get_parameter(name).grad
        error = (grad - expected).norm() / expected.norm()
        assert error < 2**-7, name  # the two uses of a weight may be summed in another order


class WithoutCasts(nn.Module):
    """The module in double precision, with no autocast and no cast to float32."""

    def __init__(self, module: Mixed) -> None:
        super().__init__()
        for name, child in copy.deepcopy(module).double().named_children():
            self.add_module(name, child)
        self.scale = nn.Parameter(module.scale.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        with off():
            y = F.gelu(self.up(x))
            y = F.scaled_dot_product_attention(y, y, self.norm(y))
            z = (y @ self.down.weight) * self.scale
            return self.down(z) + F.linear(y, self.up.weight.t())


def gradients(module: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """What eager autograd computes."""
    x = x.clone().requires_grad_()
    output = module(x)
    output.backward(cotangent.to(output.dtype))
    return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


# Derived parameters.


def to_low(low: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda params: {name: p.to(low) for name, p in params.items()}


class Casts(TorchDispatchMode):
    """Counts casts of tensors with memory, by their shapes."""

    def __init__(self, source: torch.dtype, result: torch.dtype) -> None:
        super().__init__()
        self.dtypes = source, result
        self.shapes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], FakeTensor):
            self.shapes[args[0].shape] += (args[0].dtype, kwargs["dtype"]) == self.dtypes
        return func(*args, **(kwargs or {}))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def accumulated(
    stage: Any, params: Any, buffers: Any, batches: Tensor, cotangents: Tensor, accumulate: Any = None
) -> Any:
    """All microbatches forward, then backward, and the sum of their weight gradients."""
    pending = []
    for x, cotangent in zip(batches, cotangents, strict=True):
        _, buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
        pending.append(pullback(cotangent)[1])
    return fs.stage_backward_weight(pending, accumulate)


def in_float32(params: Any) -> Any:
    return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}


@LOW
def test_gradients_through_a_cast_are_those_of_a_model_that_casts_in_every_microbatch(
    network: nn.Module, low: torch.dtype
) -> None:
    apply, params, buffers = fs.functionalize(network)
    batches, cotangents = torch.randn(4, 5, 6).to(low), torch.randn(4, 5, 4).to(low)
    derived, pullback = fs.derive(to_low(low), params)
    assert {p.dtype for p in derived.values()} == {low}
    grads = pullback(accumulated(apply, derived, buffers, batches, cotangents, in_float32(params)))
    for x, cotangent in zip(batches, cotangents, strict=True):
        cast = {name: p.to(low) for name, p in network.named_parameters()}
        torch.func.functional_call(network, cast, x).backward(cotangent)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=0)


@LOW
def test_compiled_gradients_through_a_cast_are_as_near_to_the_exact_ones_as_eagers(
    network: nn.Module, low: torch.dtype
) -> None:
    apply, params, buffers = fs.functionalize(network)
    batches, cotangents = torch.randn(8, 5, 6).to(low), torch.randn(8, 5, 4).to(low)
    derived, pullback = fs.derive(to_low(low), params)
    grads = pullback(accumulated(aten(apply), derived, buffers, batches, cotangents, in_float32(params)))
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(derived[name])
    for x, cotangent in zip(batches, cotangents, strict=True):
        cast = {name: p.to(low) for name, p in network.named_parameters()}
        torch.func.functional_call(network, cast, x).backward(cotangent)
        exact(x.double()).backward(cotangent.double())
    for name, parameter in network.named_parameters():
        assert grads[name].dtype == torch.float32
        wanted = exact.get_parameter(name).grad
        ours, eagers = (float((g - wanted).norm()) for g in (grads[name], parameter.grad))
        assert ours <= 1.2 * eagers, f"{name}: {ours} against {eagers}"


@pytest.mark.supports("parameters cast once a step: `fs.derive`, `param_dtype=`")
@ENGINES
def test_a_derived_cast_runs_once_a_step_and_not_once_a_microbatch(network: nn.Module, engine: Any) -> None:
    apply, params, buffers = fs.functionalize(network)
    stage = engine(apply) if engine else apply
    batches = torch.randn(6, 5, 6, dtype=torch.bfloat16)
    cotangents = torch.randn(6, 5, 4, dtype=torch.bfloat16)
    with Casts(torch.float32, torch.bfloat16) as casts, Casts(torch.bfloat16, torch.float32) as back:
        derived, pullback = fs.derive(to_low(torch.bfloat16), params)
        pullback(accumulated(stage, derived, buffers, batches, cotangents))
    once = Counter(p.shape for p in params.values())
    assert +casts.shapes == +back.shapes == once


def test_wide_sums_pass_a_cast_unrounded() -> None:
    params = {"a": torch.randn(50), "b": torch.randn(50), "both": torch.randn(50)}

    def make(p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "a": p["a"].to(torch.bfloat16),
            "in two steps": p["b"].double().float().bfloat16(),
            "scaled": (p["b"] * 3).bfloat16(),
            "first": p["both"].bfloat16(),
            "second": p["both"].type(torch.bfloat16),
        }

    _, pullback = fs.derive(make, params)
    wide = {name: torch.randn(50) for name in ("a", "in two steps", "scaled", "first", "second")}
    grads = pullback(wide)
    torch.testing.assert_close(grads["a"], wide["a"], rtol=0, atol=0)
    torch.testing.assert_close(grads["both"], wide["first"] + wide["second"], rtol=0, atol=0)
    torch.testing.assert_close(grads["b"], wide["in two steps"] + 3 * wide["scaled"], rtol=0, atol=0)


def test_gradients_of_the_derived_dtype_are_bitwise_those_of_autograd() -> None:
    torch.manual_seed(0)
    params = {"v": torch.randn(4, 6), "g": torch.rand(4, 1), "a": torch.randn(4, 2), "b": torch.randn(2, 6)}

    def make(p: dict[str, Tensor]) -> list[Tensor]:
        normed = p["g"] * p["v"] / p["v"].norm(dim=1, keepdim=True)
        return [normed.bfloat16(), (p["v"] + p["a"] @ p["b"]).bfloat16().float(), p["g"].half().double()]

    derived, pullback = fs.derive(make, params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = make(leaves)
    grads = [torch.randn_like(leaf) for leaf in expected]
    torch.autograd.backward(expected, grads)
    for name, grad in pullback(grads).items():
        torch.testing.assert_close(grad, leaves[name].grad, rtol=0, atol=0)
    for leaf, wanted in zip(derived, expected, strict=True):
        torch.testing.assert_close(leaf, wanted.detach(), rtol=0, atol=0)
        assert not leaf.requires_grad


def test_leaves_pass_through_and_absent_gradients_stay_absent() -> None:
    params = {
        "cast": torch.randn(3),
        "same": torch.randn(3, dtype=torch.bfloat16),
        "shared": torch.randn(3),
        "unused": torch.randn(3),
        "ids": torch.arange(3),
        "scale": 2.0,
    }
    derived, pullback = fs.derive(
        lambda p: {**p, "cast": p["cast"].bfloat16(), "product": p["shared"] * p["scale"]}, params
    )
    for name in ("same", "shared", "unused", "ids", "scale"):
        assert derived[name] is params[name]
    wide = torch.randn(3)
    none = dict.fromkeys(derived)
    assert pullback(none, retain=True) == dict.fromkeys(params)
    grads = pullback({**none, "same": wide, "shared": wide, "product": wide})
    torch.testing.assert_close(grads["same"], wide, rtol=0, atol=0)  # wider than its parameter, and unrounded
    torch.testing.assert_close(grads["shared"], 3 * wide)
    assert [name for name, grad in grads.items() if grad is None] == ["cast", "unused", "ids", "scale"]


def test_a_pullback_of_derived_parameters_is_used_once_unless_retained() -> None:
    params = {"w": torch.randn(4, 3)}
    _, pullback = fs.derive(lambda p: {"w": F.normalize(p["w"])}, params)
    assert pullback.nbytes > 0
    grads = {"w": torch.randn(4, 3)}
    first = pullback(grads, retain=True)
    copied = optree.tree_map(torch.clone, pullback, namespace="funcstage")
    for again in (pullback, copied):
        torch.testing.assert_close(again(grads), first, rtol=0, atol=0)
        assert again.consumed
        assert again.nbytes == 0
        with pytest.raises(fs.ConsumedError, match="retain=True"):
            again(grads)
    leaf = params["w"].clone().requires_grad_()
    F.normalize(leaf).backward(grads["w"])
    torch.testing.assert_close(first["w"], leaf.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"v": torch.ones(2)}, fs.StructureError, "must have the structure of the derived parameters"),
        (None, fs.StructureError, "must have the structure of the derived parameters"),
        (
            {"w": torch.ones(3), "n": None},
            fs.LeafError,
            r"derived_grads\['w'\] .* bfloat16\[2\].* float32\[3\]",
        ),
        ({"w": torch.ones(2).half(), "n": None}, fs.LeafError, r"derived_grads\['w'\]"),
        ({"w": None, "n": torch.ones(1)}, fs.LeafError, r"derived_grads\['n'\] .* must be None"),
        ({"w": 1.0, "n": None}, fs.LeafError, "got float"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_and_consume_nothing(
    grads: Any, error: type[Exception], message: str
) -> None:
    _, pullback = fs.derive(lambda p: {"w": p.bfloat16(), "n": torch.ones(1).int()}, torch.ones(2))
    with pytest.raises(error, match=message):
        pullback(grads)
    torch.testing.assert_close(pullback({"w": torch.ones(2), "n": None}), torch.ones(2))


def test_what_derives_nothing_or_writes_into_parameters_is_refused() -> None:
    params = {"w": torch.ones(2)}
    with pytest.raises(fs.StructureError, match="derive expects a function"):
        fs.derive(params, params)  # type: ignore[arg-type]
    with pytest.raises(fs.StructureError, match="no tensor"):
        fs.derive(lambda p: {}, params)
    with pytest.raises(fs.PurityError, match="w"):
        fs.derive(lambda p: p["w"].mul_(2), params)
    torch.testing.assert_close(params["w"], torch.ones(2))


def test_derived_parameters_compose_with_other_transforms() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        (derived,), pullback = fs.derive(lambda p: (p[0] ** 3,), (w,))
        return (pullback((x,))[0] * derived).sum()  # 3 w^2 x w^3

    w, x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(loss)(w, x), (3 * w**5 * x).sum(1))
    torch.testing.assert_close(torch.func.grad(loss)(w[0], x[0]), 15 * w[0] ** 4 * x[0])
    torch.testing.assert_close(
        torch.func.jvp(loss, (w[0], x[0]), (x[0], w[0]))[1],
        (15 * w[0] ** 4 * x[0] * x[0] + 3 * w[0] ** 6).sum(),
    )


# Stages under torch's schedules.


def sharded(inputs: int) -> list[nn.Module]:
    """Four stages in float32, with a buffer that is updated, and frozen and unused parameters."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        nn.Sequential(nn.Linear(inputs, 6), nn.Tanh()),
        nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), Average(6)),
        nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)),
        nn.Linear(6, 3),
    ]
    modules[2].register_parameter("unused", nn.Parameter(torch.ones(2)))
    return modules


class Average(nn.Module):
    """Keeps a running mean, in float32."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().float().mean(0), 0.1)
        return x - self.mean.to(x.dtype)


def loss_in_float32(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.float(), target)


class Seen(NamedTuple):
    """What there is after two steps of SGD, and how often the weights of linear layers were cast."""

    grads: list[dict[str, Tensor | None]]
    state: dict[str, Tensor]
    casts: int = 0
    weights: int = 0


def trained_in_low(rank: int, group: dist.ProcessGroup, schedule: str, compile: Any) -> Seen:
    """Two steps with parameters in float32 and computation in bfloat16; the job of every rank."""
    modules = sharded(5)
    mine = [rank, 3 - rank] if schedule in V_SHAPED else [rank, rank + 2]
    stages = [
        FunctionalPipelineStage(
            modules[i], i, 4, "cpu", group=group, compile=compile, param_dtype=torch.bfloat16
        )
        for i in mine
    ]
    driver = get_schedule_class(schedule)(stages, 4, loss_fn=loss_in_float32)
    grads = []
    with Casts(torch.float32, torch.bfloat16) as casts:
        for x, y in batches_of_steps():
            driver.step(*([x] if 0 in mine else []), target=y if 3 in mine else None)
            grads.append({f"{i}.{n}": clone(p.grad) for i in mine for n, p in modules[i].named_parameters()})
            for i in mine:
                step_of_sgd(modules[i])
    state = {f"{i}.{name}": t.clone() for i in mine for name, t in modules[i].state_dict().items()}
    weights = [p for i in mine for p in modules[i].parameters() if p.dim() == 2]
    return Seen(grads, state, sum(casts.shapes[shape] for shape in {p.shape for p in weights}), len(weights))


def batches_of_steps() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(2)
    ]


def step_of_sgd(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None


def clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def trained_by_eager(rank: int, group: dist.ProcessGroup) -> Seen:
    """The same, with the casts in the autograd graph of each microbatch; in a rank, for its one thread."""
    modules = sharded(5)
    grads = []
    for x, y in batches_of_steps():
        for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
            value = part.bfloat16()
            for module in modules:
                cast = {name: p.bfloat16() for name, p in module.named_parameters()}
                value = torch.func.functional_call(module, cast, value)
            loss_in_float32(value, target).backward()
        for module in modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 4
        grads.append(
            {f"{i}.{n}": clone(p.grad) for i, m in enumerate(modules) for n, p in m.named_parameters()}
        )
        for module in modules:
            step_of_sgd(module)
    state = {f"{i}.{name}": t.clone() for i, m in enumerate(modules) for name, t in m.state_dict().items()}
    return Seen(grads, state)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_float32_parameters_train_in_bfloat16_under_a_schedule_as_in_eager(
    schedule: str, compile: Any
) -> None:
    answers: list[Seen] = run(2, trained_in_low, schedule, compile)
    expected: Seen = run(2, trained_by_eager)[0]
    # Compiled stages sum within the products, which rounds less often than eager does.
    close = {"rtol": 2e-2, "atol": 2e-3} if compile else {"rtol": 0.0, "atol": 0.0}
    for seen in answers:
        for step, grads in enumerate(seen.grads):
            wanted = {name: expected.grads[step][name] for name in grads}
            absent = {name for name, grad in wanted.items() if grad is None}
            assert absent == {name for name, grad in grads.items() if grad is None}
            for name in grads.keys() - absent:
                assert grads[name].dtype == torch.float32
                torch.testing.assert_close(grads[name], wanted[name], **close)
        torch.testing.assert_close(seen.state, {name: expected.state[name] for name in seen.state}, **close)
        assert seen.casts == 2 * seen.weights, "once a step, not once a microbatch"


def test_a_param_dtype_that_is_no_floating_dtype_is_refused() -> None:
    with pytest.raises(fs.LeafError, match=r"param_dtype must be a floating dtype.*got torch\.int8"):
        FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", param_dtype=torch.int8)
