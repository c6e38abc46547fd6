"""DTensors as parameters, buffers, arguments, cotangents and results, on both engines, against eager."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from both_ways import ENGINES, stage_of
from one_process import one_process
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F

import funcstage as fs

pytestmark = pytest.mark.timeout(600)


def full(leaf: Any) -> Any:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def by_eager(
    apply: Callable[..., Any], params: dict[str, Tensor], buffers: Any, x: Tensor, cotangent: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Output, gradient of x and gradients of the parameters, by autograd alone."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    given = x.detach().requires_grad_()
    output, _ = apply(leaves, buffers, given)
    grads = torch.autograd.grad(output, [given, *leaves.values()], cotangent(output), allow_unused=True)
    return output.detach(), grads[0], dict(zip(leaves, grads[1:], strict=True))


def assert_alike(found: Any, wanted: Any) -> None:
    """The same values, placed alike."""
    assert type(found) is type(wanted)
    if isinstance(found, DTensor):
        assert found.device_mesh == wanted.device_mesh
        looks = [(t.placements, t.shape, t.stride(), t.dtype) for t in (found, wanted)]
        assert looks[0] == looks[1], looks
        torch.testing.assert_close(found.to_local(), wanted.to_local(), rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def cosine(output: Tensor) -> Tensor:
    """A cotangent that is placed as the output is, where that is no sum over ranks."""
    if not isinstance(output, DTensor):
        return output.cos()
    return output.cos().redistribute(placements=of_cotangent(output.placements))


def of_cotangent(placements: Sequence[Placement]) -> list[Placement]:
    return [Replicate() if placement.is_partial() else placement for placement in placements]


def placed_otherwise(output: Any) -> Any:
    """The same cotangent, of which every rank has the whole, or its rows."""
    cotangent = cosine(output)
    whole = all(placement.is_replicate() for placement in cotangent.placements)
    return cotangent.redistribute(placements=[Shard(0) if whole else Replicate()] * output.device_mesh.ndim)


def check(
    apply: Callable[..., Any],
    params: dict[str, Tensor],
    buffers: Any,
    x: Tensor,
    cotangent: Callable[[Tensor], Tensor] = cosine,
    engines: Sequence[str] = ENGINES,
) -> None:
    """Compare two microbatches in flight with eager."""
    output, dx, grads = by_eager(apply, params, buffers, x, cotangent)
    for engine in engines:
        stage = stage_of(apply, engine)
        pullbacks = [fs.stage_vjp(stage, params, buffers, x) for _ in range(2)]
        for found, _, pullback in pullbacks:
            assert_alike(found, output)
            (found_dx,), weight_pullback = pullback(cotangent(found))
            assert_alike(found_dx, dx)
            for name, grad in weight_pullback().items():
                assert (grad is None) == (grads[name] is None), name
                if grad is not None and isinstance(params[name], DTensor):
                    assert isinstance(grad, DTensor)
                    is_sum = any(placement.is_partial() for placement in params[name].placements)
                    assert is_sum or grad.placements == params[name].placements, (name, grad.placements)
                torch.testing.assert_close(full(grad), full(grads[name]), rtol=1e-10, atol=1e-12)


def values_alike(
    apply: Callable[..., Any], params: dict[str, Tensor], x: Tensor, engines: Sequence[str]
) -> None:
    """Values do not depend on how a cotangent is placed."""
    _, dx, grads = by_eager(apply, params, {}, x, placed_otherwise)
    for engine in engines:
        output, _, pullback = fs.stage_vjp(stage_of(apply, engine), params, {}, x)
        (found,), weight_pullback = pullback(placed_otherwise(output))
        found_grads = weight_pullback()
        torch.testing.assert_close(full(found), full(dx), rtol=1e-10, atol=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(full(found_grads[name]), full(grad), rtol=1e-10, atol=1e-12)


def perceptron(params: dict[str, Tensor], buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
    hidden = F.gelu(F.linear(x, params["up"], params["bias"]))
    return F.linear(hidden, params["down"]) * params["scale"], buffers


def any_placements(rank: int, group: Any, shape: tuple[int, ...], engines: Sequence[str]) -> int:
    """A perceptron of sizes that no mesh divides, with parameters and input placed in all kinds of ways."""
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    sizes = {"up": (7, 5), "bias": (7,), "down": (3, 7), "scale": (3,)}
    whole = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    x = torch.randn(6, 5, dtype=torch.float64)
    random.seed(len(shape))
    of_matrices: list[list[Placement]] = [
        list(chosen) for chosen in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=mesh.ndim)
    ]
    of_vectors: list[list[Placement]] = [
        list(chosen) for chosen in itertools.product([Replicate(), Shard(0)], repeat=mesh.ndim)
    ]
    for _ in range(6):
        params = {
            name: distribute_tensor(p, mesh, random.choice(of_matrices if p.ndim == 2 else of_vectors))
            for name, p in whole.items()
        }
        given = distribute_tensor(x, mesh, random.choice(of_vectors))
        check(perceptron, params, {}, given, engines=engines)
        values_alike(perceptron, params, given, engines)
    return 1


@pytest.mark.slow
@pytest.mark.supports(
    "DTensor parameters (`parallelize_module`), inputs and outputs, of any mesh and placements"
)
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_gradients_of_dtensors_are_eagers_whatever_their_placements(shape: tuple[int, ...]) -> None:
    size = 2 if shape == (2,) else 4
    assert run(size, any_placements, shape, ENGINES) == [1] * size


def strided(whole: Tensor, mesh: DeviceMesh, rest: Placement) -> Any:
    """Split by the last dimension of the mesh, if by that, and then by the first, as FSDP does."""
    here = distribute_tensor(whole, mesh, [Replicate(), rest]).to_local()
    mine = here.chunk(2)[(mesh.get_coordinate() or [0])[0]].contiguous()
    placed = [_StridedShard(0, split_factor=2), rest]
    return DTensor.from_local(mine, mesh, placed, run_check=False, shape=whole.shape, stride=whole.stride())


def strided_or_partial(rank: int, group: Any) -> int:
    """A perceptron whose parameters are split twice in one dimension, or lie as sums over ranks."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    sizes = {"up": (8, 4), "bias": (8,), "down": (4, 8), "scale": (4,)}
    whole = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    x = torch.randn(8, 4, dtype=torch.float64)
    plain = {name: distribute_tensor(p, mesh) for name, p in whole.items()}
    split = {name: strided(whole[name], mesh, Shard(0)) for name in ("up", "bias")}
    sums = {
        name: DTensor.from_local(whole[name] / 2, mesh, [Partial(), Replicate()], run_check=False)
        for name in ("up", "scale")
    }
    owns: list[dict[str, Any]] = [{"up": sums["up"]}, {"scale": sums["scale"]}]
    if torch.__version__ >= "2.12":  # eager's own error before
        owns.append(split)
    for own in owns:
        for placed in ([Replicate(), Replicate()], [Shard(0), Replicate()], [Shard(0), Shard(0)]):
            check(perceptron, {**plain, **own}, {}, distribute_tensor(x, mesh, placed))
    return 1


@pytest.mark.slow
def test_parameters_may_be_split_twice_in_one_dimension_or_be_sums() -> None:
    assert run(4, strided_or_partial) == [1] * 4


def rows_of(x: Tensor, mesh: DeviceMesh) -> Any:
    """What all ranks have, split by rows."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(0)])


class Block(nn.Module):
    """A perceptron on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().double()


def in_columns(mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(block(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def in_sequence(mesh: DeviceMesh) -> nn.Module:
    plan = {
        "": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
        ),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    module = parallelize_module(block(), mesh, plan)
    return parallelize_module(
        module, mesh, PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    )


def replicated(mesh: DeviceMesh) -> nn.Module:
    """Whole parameters, whose inputs and outputs are split by rows."""

    def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return (rows_of(inputs[0], mesh),)

    def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.full_tensor()

    return distribute_module(block(), mesh, None, enter, leave)


PARALLEL = {"columns": in_columns, "sequence": in_sequence, "distribute_module": replicated}


def parallel(rank: int, group: Any, kind: str, engine: str) -> int:
    """A module that torch has parallelized, beside the same one whole."""
    whole, module = block(), PARALLEL[kind](init_device_mesh("cpu", (2,)))
    torch.manual_seed(1)
    xs = torch.randn(3, 4, 6, 4, dtype=torch.float64)
    stage = fs.functionalize(module)
    apply = stage_of(stage.apply, engine)
    total = None
    for x in xs:
        output, _, pullback = fs.stage_vjp(apply, stage.params, stage.buffers, x)
        (dx,), weight_pullback = pullback(output.cos())
        total = fs.stage_backward_weight(weight_pullback, total)
        given = x.clone().requires_grad_()
        expected = whole(given)
        expected.sin().sum().backward()
        torch.testing.assert_close(output, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dx, given.grad, rtol=1e-10, atol=1e-12)
    assert total is not None
    for name, parameter in whole.named_parameters():
        like = stage.params[name]
        assert getattr(total[name], "placements", None) == getattr(like, "placements", None)
        torch.testing.assert_close(full(total[name]), parameter.grad, rtol=1e-10, atol=1e-12)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "inductor"])
@pytest.mark.parametrize("kind", PARALLEL)
def test_parallelized_modules_have_the_gradients_of_the_whole_one(kind: str, engine: str) -> None:
    assert run(2, parallel, kind, engine) == [1, 1]


class Shifted(nn.Module):
    """Reads a DTensor among its buffers, writes into it, and takes one by keyword."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(5, 4, dtype=torch.float64)
        self.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        self.register_buffer("seen", distribute_tensor(torch.zeros(5).double(), mesh, [Shard(0)]))

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        self.seen.add_(y.detach().sum(0).redistribute(placements=[Shard(0)]))
        return y * self.seen.detach() + shift


def buffers_and_keywords(rank: int, group: Any, engine: str) -> int:
    mesh = init_device_mesh("cpu", (2,))
    x, shift = (distribute_tensor(torch.randn(n, dtype=torch.float64), mesh) for n in ((6, 4), (6, 5)))
    module, twin = Shifted(mesh), Shifted(mesh)
    apply, params, buffers = fs.functionalize(module)
    output, new_buffers, pullback = fs.stage_vjp(stage_of(apply, engine), params, buffers, x, shift=shift)
    given = x.detach().requires_grad_()
    expected = twin(given, shift=shift)
    expected.sin().sum().backward()
    assert_alike(output, expected.detach())
    assert_alike(new_buffers["seen"], twin.seen)
    assert not full(buffers["seen"]).any()
    (dx,), weight_pullback = pullback(cosine(output))
    torch.testing.assert_close(full(dx), full(given.grad), rtol=1e-10, atol=1e-12)
    assert_alike(weight_pullback()["weight"], twin.weight.grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_and_keywords_may_be_dtensors(engine: str) -> None:
    assert run(2, buffers_and_keywords, engine) == [1, 1]


def partial_loss(rank: int, group: Any, engine: str) -> int:
    """A loss that is a sum over ranks, without and with a cotangent."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x = distribute_tensor(torch.randn(6, 4, dtype=torch.float64), mesh, [Shard(0)])
    params = {"weight": distribute_tensor(torch.randn(3, 4, dtype=torch.float64), mesh)}

    def loss(params: Any, buffers: Any, x: Tensor) -> Any:
        return F.linear(x, params["weight"]).sin().sum(), buffers

    stage = stage_of(loss, engine)
    value, _, pullback = fs.stage_vjp(stage, params, {}, x)
    assert isinstance(value, DTensor)
    assert value.placements == (Partial(),)
    _, dx, grads = by_eager(loss, params, {}, x, lambda output: None)
    (found,), weight_pullback = pullback()
    torch.testing.assert_close(full(found), full(dx))
    torch.testing.assert_close(full(weight_pullback()["weight"]), full(grads["weight"]))
    twice = distribute_tensor(torch.tensor(2.0, dtype=torch.float64), mesh)
    (found,), _ = fs.stage_vjp(stage, params, {}, x)[2](twice)
    torch.testing.assert_close(full(found), 2 * full(dx))
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_a_sum_over_ranks_needs_no_cotangent(engine: str) -> None:
    assert run(2, partial_loss, engine) == [1, 1]


def loss_over_columns(rank: int, group: Any, engine: str) -> int:
    """Cross entropy of logits whose classes are split over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Linear(4, 8).double()
    torch.manual_seed(0)
    for p in whole.parameters():
        nn.init.normal_(p)
    x, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(8, (6,))
    given = x.clone().requires_grad_()
    expected = F.cross_entropy(whole(given), target)
    expected.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    parallelize_module(whole, mesh, ColwiseParallel(output_layouts=Shard(1), use_local_output=False))
    apply, params, buffers = fs.functionalize(whole)

    def with_loss(params: Any, buffers: Any, x: Tensor, target: Tensor) -> Any:
        logits, buffers = apply(params, buffers, x)
        return F.cross_entropy(logits, target), buffers

    stage = stage_of(with_loss, engine)
    fs.stage_vjp(stage, params, buffers, x, distribute_tensor(target, mesh))  # another trace
    for _ in range(2):
        with loss_parallel():
            value, _, pullback = fs.stage_vjp(stage, params, buffers, x, distribute_tensor(target, mesh))
            (dx, _), weight_pullback = pullback()
            grads = weight_pullback()
        torch.testing.assert_close(full(value), expected.detach())
        torch.testing.assert_close(full(dx), given.grad)
        for name, grad in wanted.items():
            torch.testing.assert_close(full(grads[name]), grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_may_be_parallel_over_its_classes(engine: str) -> None:
    assert run(2, loss_over_columns, engine) == [1, 1]


class Inside(nn.Module):
    """Plain outside; inside its weight becomes a DTensor, and the activations do."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        rows = rows_of(x, self.mesh)
        weight = DTensor.from_local(self.weight, self.mesh, [Replicate()], run_check=False)
        return F.linear(rows, weight).sin().full_tensor()


def made_inside(rank: int, group: Any, engine: str) -> int:
    module = Inside(init_device_mesh("cpu", (2,)))
    x = torch.randn(6, 4, dtype=torch.float64)
    apply, params, buffers = fs.functionalize(module)
    given = x.clone().requires_grad_()
    expected = module(given)
    expected.backward(expected.detach().cos())
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(stage_of(apply, engine), params, buffers, x)
        torch.testing.assert_close(output, expected.detach())
        (dx,), weight_pullback = pullback(output.cos())
        torch.testing.assert_close(full(dx), full(given.grad))
        torch.testing.assert_close(weight_pullback()["weight"], module.weight.grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_dtensors_may_be_made_inside_of_a_stage(engine: str) -> None:
    assert run(2, made_inside, engine) == [1, 1]


def weight_and_input(mesh: DeviceMesh, seed: int = 0) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(seed)
    weight, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    return {"weight": distribute_tensor(weight, mesh, [Shard(0)])}, distribute_tensor(x, mesh)


def product(params: Any, buffers: Any, x: Tensor) -> Any:
    return F.linear(x, params["weight"]), buffers


def refusals(rank: int, group: Any, engine: str) -> list[str]:
    """What does not fit, each before anything is consumed: the pullback is used at the end."""
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    params, x = weight_and_input(mesh)
    output, _, pullback = fs.stage_vjp(stage_of(product, engine), params, {}, x)
    whole = full(output)
    messages = []

    def refused(attempt: Callable[[], Any]) -> None:
        with pytest.raises(fs.LeafError) as error:
            attempt()
        messages.append(str(error.value))

    refused(lambda: pullback(whole))
    refused(lambda: pullback(distribute_tensor(whole, other)))
    _, weight_pullback = pullback(output)
    refused(lambda: fs.stage_backward_weight(weight_pullback, {"weight": torch.zeros(5, 4).double()}))
    elsewhere = distribute_tensor(torch.zeros(5, 4).double(), other)
    refused(lambda: fs.stage_backward_weight(weight_pullback, {"weight": elsewhere}))
    torch.testing.assert_close(full(weight_pullback()["weight"]), whole.t() @ full(x))
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_dtensor_of_the_same_mesh_is_refused_and_consumes_nothing(engine: str) -> None:
    for messages in run(2, refusals, engine):
        assert len(messages) == 4
        for message in messages[:2]:
            assert "output_grads" in message
            assert "a DTensor, float64[6, 5] on cpu over DeviceMesh" in message
        for message in messages[2:]:
            assert "accumulate['weight']" in message


def sums(rank: int, group: Any, engine: str) -> int:
    """Sums over microbatches: from nothing, into what is donated, in another dtype, placed otherwise."""
    mesh = init_device_mesh("cpu", (2,))
    params, x = weight_and_input(mesh)
    params = {"weight": params["weight"].float()}
    stage = stage_of(product, engine)

    def pending() -> list[Any]:
        pullbacks = [fs.stage_vjp(stage, params, {}, x.float() * i)[2] for i in (1, 2)]
        cotangent = distribute_tensor(torch.ones(6, 5), mesh, [Shard(1)])
        return [pullback(cotangent)[1] for pullback in pullbacks]

    once = full(fs.stage_backward_weight(pending()[0])["weight"])
    for kind in (None, torch.float32, torch.float64):
        for placement in (Shard(0), Shard(1), Replicate()):
            total = None
            if kind is not None:
                total = {"weight": distribute_tensor(torch.ones(5, 4, dtype=kind), mesh, [placement])}
            held = total and total["weight"]
            found = fs.stage_backward_weight(pending(), total)["weight"]
            if held is not None:
                assert found is held
                assert found.placements == (placement,)
            torch.testing.assert_close(full(found), once * 3 + (total is not None), check_dtype=False)
            assert found.dtype == (kind or torch.float32)
    retained = pending()[0]
    first, second = (retained(retain=True)["weight"] for _ in range(2))
    first.add_(1)
    torch.testing.assert_close(full(second), once)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_dtensors_are_summed_over_microbatches(engine: str) -> None:
    assert run(2, sums, engine) == [1, 1]


def derived(rank: int, group: Any, engine: str) -> int:
    mesh = init_device_mesh("cpu", (2,))
    params, x = weight_and_input(mesh)
    scaled, back = fs.derive(lambda p: {"weight": p["weight"] * 3, "same": p["weight"]}, params)

    def stage(params: Any, buffers: Any, x: Tensor) -> Any:
        return F.linear(x, params["weight"]) + F.linear(x, params["same"]).sin(), buffers

    output, _, pullback = fs.stage_vjp(stage_of(stage, engine), scaled, {}, x)
    grads = back(pullback(cosine(output))[1]())
    leaf = full(params["weight"]).requires_grad_()
    expected = F.linear(full(x), leaf * 3) + F.linear(full(x), leaf).sin()
    expected.sin().sum().backward()
    assert grads["weight"].placements == (Shard(0),)
    torch.testing.assert_close(full(grads["weight"]), leaf.grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_derived_from_dtensors_run_once_a_step(engine: str) -> None:
    assert run(2, derived, engine) == [1, 1]


def written_between(rank: int, group: Any, engine: str) -> int:
    """An optimizer writes through the DTensor, somebody else into what this rank has of it."""
    mesh = init_device_mesh("cpu", (2,))
    for write in (lambda p: p.mul_(2), lambda p: p.to_local().mul_(2)):
        params, x = weight_and_input(mesh)
        output, _, pullback = fs.stage_vjp(stage_of(product, engine), params, {}, x)
        with torch.no_grad():
            write(params["weight"])
        with pytest.raises(fs.WrittenError, match="weight"):
            pullback(output)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_dtensor_that_is_written_between_is_noticed(engine: str) -> None:
    assert run(2, written_between, engine) == [1, 1]


def retraced(rank: int, group: Any) -> int:
    """The same local shapes under other placements are another signature."""
    mesh, turned = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [1, 0])
    compiled = fs.compile(product, backend="aten")
    torch.manual_seed(0)
    weight, x = torch.randn(4, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for where, placement in ((mesh, Shard(0)), (mesh, Shard(1)), (turned, Shard(0)), (mesh, Shard(0))):
        params = {"weight": distribute_tensor(weight, where, [placement])}
        output, _, pullback = fs.stage_vjp(compiled, params, {}, distribute_tensor(x, where))
        torch.testing.assert_close(full(output), x @ weight.t())
        grads = pullback(cosine(output))[1]()
        torch.testing.assert_close(full(grads["weight"]), (x @ weight.t()).cos().t() @ x)
    assert "3 signature(s)" in repr(compiled)
    return 1


@pytest.mark.slow
def test_placements_and_meshes_are_a_part_of_the_signature() -> None:
    assert run(2, retraced) == [1, 1]


def dropped(rank: int, group: Any, engine: str) -> int:
    """Random numbers are those that eager draws."""
    mesh = init_device_mesh("cpu", (2,))
    params, x = weight_and_input(mesh)

    def stage(params: Any, buffers: Any, x: Tensor) -> Any:
        return F.dropout(F.linear(x, params["weight"]), 0.5), buffers

    torch.manual_seed(3)
    output, dx, grads = by_eager(stage, params, {}, x, cosine)
    torch.manual_seed(3)
    found, _, pullback = fs.stage_vjp(stage_of(stage, engine), params, {}, x)
    assert_alike(found, output)
    (found_dx,), weight_pullback = pullback(cosine(found))
    torch.testing.assert_close(full(found_dx), full(dx))
    torch.testing.assert_close(full(weight_pullback()["weight"]), full(grads["weight"]))
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_of_a_dtensor_draws_as_eager_does(engine: str) -> None:
    assert run(2, dropped, engine) == [1, 1]


class Experts(nn.Module):
    """Hidden columns on each rank, in a `local_map` of what has just been gathered."""

    def __init__(self, mesh: DeviceMesh, copies: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mesh, self.copies = mesh, copies
        self.up = nn.Parameter(distribute_tensor(torch.randn(4, 6).double(), mesh, [Shard(1)]))
        self.down = nn.Parameter(distribute_tensor(torch.randn(6, 4).double(), mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        gathered: Any = x.redistribute(placements=[Replicate()], async_op=True)  # type: ignore[attr-defined]
        mapped: Any = local_map(
            lambda x, up, down: torch.tanh(x @ up) @ down,
            out_placements=[Partial()],
            in_placements=([Replicate()], [Shard(1)], [Shard(0)]),
            in_grad_placements=([Partial()], [Shard(1)], [Shard(0)]),
            device_mesh=self.mesh,
        )
        mixed = mapped(gathered.clone() if self.copies else gathered, self.up, self.down)
        return gathered + mixed.redistribute(placements=[Replicate()])


def mapped(rank: int, group: Any, engine: str, copies: bool) -> int:
    mesh = init_device_mesh("cpu", (2,))
    module = Experts(mesh, copies)
    apply, params, buffers = fs.functionalize(module)
    torch.manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64)
    output, _, pullback = fs.stage_vjp(
        stage_of(apply, engine), params, buffers, distribute_tensor(x, mesh, [Shard(0)])
    )
    (dx,), weight_pullback = pullback(output.cos())
    grads = weight_pullback()
    given, up, down = (t.detach().clone().requires_grad_() for t in (x, full(module.up), full(module.down)))
    expected = given + torch.tanh(given @ up) @ down
    expected.sin().sum().backward()
    torch.testing.assert_close(full(output), expected.detach())
    torch.testing.assert_close(full(dx), given.grad)
    torch.testing.assert_close(full(grads["up"]), up.grad)
    torch.testing.assert_close(full(grads["down"]), down.grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "copies"), [("uncompiled", True), ("aten", True), ("aten", False)])
def test_what_was_just_gathered_may_enter_a_local_map(engine: str, copies: bool) -> None:
    # Without the copy torch's own local_map loses that gradient where nothing is traced.
    assert run(2, mapped, engine, copies) == [1, 1]


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_anomaly_mode_around_the_programs_of_dtensors_is_refused_as_they_do_not_look_for_nan() -> None:
    with one_process():
        module = distribute_module(nn.Linear(3, 2), init_device_mesh("cpu", (1,)))
        apply, params, buffers = fs.functionalize(module)
        x = distribute_tensor(torch.randn(4, 3), module.weight.device_mesh, [Replicate()])  # type: ignore[attr-defined]
        output, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
        cotangent = torch.ones_like(output)
        with torch.autograd.detect_anomaly(), pytest.raises(fs.StageError, match=r"I of Linear is compiled"):
            pullback(cotangent)
        _, weight_pullback = pullback(cotangent)
        with torch.autograd.detect_anomaly(), pytest.raises(fs.StageError, match=r"W of Linear is compiled"):
            weight_pullback()
        torch.testing.assert_close(full(weight_pullback()["bias"]), torch.full((2,), 4.0))


def test_sites_of_a_compiled_stage_on_dtensors_are_refused_and_w_runs_after_it() -> None:
    with one_process():
        module = distribute_module(nn.Linear(3, 2), init_device_mesh("cpu", (1,)))
        apply, params, buffers = fs.functionalize(module)
        x = distribute_tensor(torch.randn(4, 3), init_device_mesh("cpu", (1,)), [Replicate()])
        output, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
        _, weight_pullback = pullback(torch.ones_like(output))
        with pytest.raises(fs.StageError, match=r"sites of Linear cannot be told apart: it runs on DTensors"):
            _ = weight_pullback.sites
        torch.testing.assert_close(full(weight_pullback()["bias"]), torch.full((2,), 4.0))
