"""Tensor parallelism inside of stages: functional collectives and DTensors, in processes with gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_ranks import run
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, pipeline_order

pytestmark = pytest.mark.timeout(600)

WIDTH, HIDDEN, ROWS = 4, 8, 6
STAGES, MICROBATCHES, STEPS = 4, 4, 2


class Whole(nn.Module):
    """A perceptron on a residual branch, on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Copied(Function):
    """The identity, whose backward sums over the ranks: activations enter what is split over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.wait_tensor(collectives.all_reduce(grad, "sum", ctx.group)), None


class Summed(Function):
    """The sum over the ranks, whose backward is the identity; with a setup_context of its own."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clone(), None


class Sharded(nn.Module):
    """The same with its products split over ranks, all of which have the whole of `x`."""

    def __init__(self, whole: Whole, group: Any) -> None:
        super().__init__()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.norm = whole.norm
        self.up = nn.Parameter(whole.up.weight.detach().chunk(size, 0)[rank].clone())
        self.down = nn.Parameter(whole.down.weight.detach().chunk(size, 1)[rank].clone())
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(Copied.apply(self.norm(x), self.group) @ self.up.t())
        return x + Summed.apply(hidden @ self.down.t(), self.group)


class SequenceSharded(Sharded):
    """The same where each rank has some rows of `x`, which torch's own operators gather and scatter."""

    def forward(self, x: Tensor) -> Tensor:
        rows = collectives.all_gather_tensor_autograd(self.norm(x), 0, self.group)
        hidden = functional.gelu(rows @ self.up.t())
        return x + collectives.reduce_scatter_tensor_autograd(hidden @ self.down.t(), "sum", 0, self.group)


class GatheredWeights(Sharded):
    """The same with weights gathered for the products, of which all ranks compute the whole."""

    def __init__(self, whole: Whole, group: Any) -> None:
        super().__init__(whole, group)
        self.down = nn.Parameter(whole.down.weight.detach().chunk(2, 0)[dist.get_rank(group)].clone())

    def forward(self, x: Tensor) -> Tensor:
        up = collectives.all_gather_tensor_autograd(self.up, 0, self.group)
        down = collectives.all_gather_tensor_autograd(self.down, 0, self.group)
        return x + functional.gelu(self.norm(x) @ up.t()) @ down.t()


KINDS = {"columns": Sharded, "rows": SequenceSharded, "weights": GatheredWeights}


def parallelized(whole: Whole, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(whole, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def shards_of(grads: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """The gradients of a `Whole` as those of a `Sharded`."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return {
        "norm.weight": grads["norm.weight"],
        "norm.bias": grads["norm.bias"],
        "up": grads["up.weight"].chunk(size, 0)[rank],
        "down": grads["down.weight"].chunk(size, 1)[rank],
    }


def whole_model(parts: int) -> list[Whole]:
    torch.manual_seed(0)
    return [Whole().double() for _ in range(parts)]


def stage_of(module: nn.Module, engine: str) -> fs.FunctionalStage:
    stage = fs.functionalize(module)
    return stage if engine == "closures" else stage._replace(apply=fs.compile(stage.apply, backend=engine))


def split_on(rank: int, group: Any, kind: str, engine: str) -> dict[str, Any]:
    """F, I and W of two microbatches in flight, beside the gradients of the whole layer."""
    (whole,) = whole_model(1)
    torch.manual_seed(1)
    xs = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    expected = []
    for x in xs:
        leaf = x.clone().requires_grad_()
        output = whole(leaf)
        grads = torch.autograd.grad(output.sin().sum(), [leaf, *whole.parameters()])
        expected.append((output.detach(), *grads))
    names = [name for name, _ in whole.named_parameters()]
    if kind == "dtensor":
        mesh = init_device_mesh("cpu", (2,))
        stage = stage_of(parallelized(whole, mesh), engine)
    else:
        stage = stage_of(KINDS[kind](whole, group), engine)
    mine = [x.chunk(2)[rank] if kind == "rows" else x for x in xs]
    forwards = [fs.stage_vjp(*stage, x) for x in mine]
    backwards = [pullback(torch.cos(output)) for output, _, pullback in forwards]
    found, wanted = [], []
    for (output, _, _), ((dx,), weight_pullback), (y, y_dx, *y_grads) in zip(
        forwards, backwards, expected, strict=True
    ):
        grads = weight_pullback()
        whole_grads = dict(zip(names, y_grads, strict=True))
        if kind == "dtensor":
            for name, grad in grads.items():
                parameter = stage.params[name]
                assert type(grad) is type(parameter)
                assert getattr(grad, "placements", None) == getattr(parameter, "placements", None)
            found.append([output, dx, *[_full(grad) for grad in grads.values()]])
            wanted.append([y, y_dx, *y_grads])
        elif kind == "rows":
            # each rank has the norm's gradient of its own rows
            for name in ("norm.weight", "norm.bias"):
                dist.all_reduce(grads[name], group=group)
            found.append([output, dx, grads])
            wanted.append([y.chunk(2)[rank], y_dx.chunk(2)[rank], shards_of(whole_grads, group)])
        elif kind == "weights":
            # every rank has all of the loss, so that the sums that arrive are twice its gradient
            shards = {name: whole_grads[f"{name}.weight"].chunk(2)[rank] * 2 for name in ("up", "down")}
            found.append([output, dx, {name: grads[name] for name in shards}])
            wanted.append([y, y_dx, shards])
        else:
            found.append([output, dx, grads])
            wanted.append([y, y_dx, shards_of(whole_grads, group)])
    counts = _collectives_in(stage.apply) if engine == "aten" else None
    return {"found": found, "wanted": wanted, "counts": counts}


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _collectives_in(compiled: Any) -> list[list[str]]:
    """The collectives of F, I and W."""
    (programs,) = compiled._traced.values()
    parts = programs.partition
    return [
        [
            node.target._opname
            for node in program.module.graph.nodes
            if getattr(node.target, "namespace", "") == "_c10d_functional" and "wait" not in node.name
        ]
        for program in (parts.forward, parts.input_grad, parts.weight_grad)
    ]


@pytest.mark.slow
@pytest.mark.supports("functional collectives (tensor parallelism)")
@pytest.mark.parametrize("engine", ["closures", "aten", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_collectives_in_a_stage_are_split(kind: str, engine: str) -> None:
    answers = run(2, split_on, kind, engine)
    for answer in answers:
        torch.testing.assert_close(answer["found"], answer["wanted"], rtol=1e-11, atol=1e-13)
    if engine == "aten":
        assert answers[0]["counts"] == answers[1]["counts"], "ranks must meet in the same order"
        of_f, of_i, of_w = answers[0]["counts"]
        if kind == "columns":
            assert (of_f, of_i, of_w) == (["all_reduce"], ["all_reduce"], [])
        elif kind == "weights":
            assert (len(of_f), of_i, of_w) == (2, [], ["reduce_scatter_tensor"] * 2)
        else:
            assert len(of_f) == len(of_i) == 2
            assert of_w == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_dtensors_are_split(engine: str) -> None:
    for answer in run(2, split_on, "dtensor", engine):
        torch.testing.assert_close(answer["found"], answer["wanted"], rtol=1e-11, atol=1e-13)


def refused(rank: int, group: Any) -> str:
    (whole,) = whole_model(1)
    apply, params, buffers = fs.functionalize(parallelized(whole, init_device_mesh("cpu", (2,))))
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    with pytest.raises(fs.StageError) as error:
        torch.func.vmap(lambda x: fs.stage_vjp(apply, params, buffers, x)[0])(x[None])
    return str(error.value)


@pytest.mark.slow
def test_what_dtensors_cannot_do_is_refused_with_the_way_round() -> None:
    for transformed in run(2, refused):
        assert "before parallelize_module" in transformed


def train_on_mesh(rank: int, group: Any, kind: str, schedule: str, compile: Any) -> list[dict[str, Tensor]]:
    """Steps of a pipeline of two ranks whose stages are split over two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
    place, pipeline, tensor = mesh["pipeline"].get_local_rank(), mesh["pipeline"].get_group(), mesh["tensor"]
    whole = whole_model(STAGES)
    mine = pipeline_order(schedule, STAGES, MICROBATCHES, num_ranks=2).stages_of(place)
    make = parallelized if kind == "dtensor" else lambda part, mesh: Sharded(part, mesh.get_group())
    modules = {i: make(whole[i], tensor) for i in mine}
    stages = [
        FunctionalPipelineStage(modules[i], i, STAGES, "cpu", group=pipeline, compile=compile) for i in mine
    ]
    schedule_class: Any = get_schedule_class(schedule)
    runner = schedule_class(stages, MICROBATCHES, loss_fn=functional.mse_loss)
    optimizer = torch.optim.SGD([p for m in modules.values() for p in m.parameters()], lr=0.1, momentum=0.9)
    steps = []
    for step in range(STEPS):
        x, target = batch(step)
        runner.step(*([x] if 0 in mine else []), target=target if STAGES - 1 in mine else None)
        found = {f"{i}.{n}": _full(p.grad).clone() for i in mine for n, p in modules[i].named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        steps.append(found)
    return steps


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + step)
    shape = 2, MICROBATCHES * 2, WIDTH
    x, target = torch.randn(shape, dtype=torch.float64)
    return x, target


def train_whole() -> list[list[dict[str, Tensor]]]:
    modules = whole_model(STAGES)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1, momentum=0.9)
    steps = []
    for step in range(STEPS):
        x, target = batch(step)
        for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            for module in modules:
                part = module(part)
            (functional.mse_loss(part, wanted) / MICROBATCHES).backward()
        steps.append([{n: p.grad.clone() for n, p in m.named_parameters()} for m in modules])
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "schedule", "compile"),
    [
        ("columns", "ZBVZeroBubble", False),
        ("columns", "ZBVZeroBubble", {"backend": "aten"}),
        ("columns", "InterleavedZeroBubble", {"backend": "aten"}),
        ("columns", "Interleaved1F1B", False),
        ("dtensor", "ZBVZeroBubble", False),
        ("dtensor", "Interleaved1F1B", False),
        ("dtensor", "ZBVZeroBubble", {"backend": "aten"}),
        ("dtensor", "Interleaved1F1B", {"backend": "aten"}),
    ],
)
def test_a_mesh_of_pipeline_and_tensor_ranks_trains_as_the_whole_model(
    kind: str, schedule: str, compile: Any
) -> None:
    answers = run(4, train_on_mesh, kind, schedule, compile)
    for rank, steps in enumerate(answers):
        for found, wanted in zip(steps, train_whole(), strict=True):
            assert found
            for name, grad in found.items():
                stage, _, parameter = name.partition(".")
                of_whole = wanted[int(stage)]
                if kind == "columns" and parameter in ("up", "down"):
                    of_whole = {
                        parameter: of_whole[f"{parameter}.weight"].chunk(2, int(parameter == "down"))[
                            rank % 2
                        ]
                    }
                torch.testing.assert_close(grad, of_whole[parameter], rtol=1e-10, atol=1e-12, msg=name)
