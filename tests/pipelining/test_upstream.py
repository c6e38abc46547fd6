"""The pipeline's input comes out of another module, whose gradient is the unsplit model's, and comes once."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from pipeline_cases import ONE_STAGE_A_RANK, Block, Case, Model, make_schedule, make_stages
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional

from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage

pytestmark = pytest.mark.timeout(600)

ATEN = {"backend": "aten"}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ENGINES = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])


class Joined(nn.Module):
    """A first stage with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block(x) * y.tanh()


class Counting(nn.Linear):
    """Counts the backwards that run through it."""

    backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x).sigmoid()  # whose backward needs what it saved
        if output.requires_grad:
            output.register_hook(self.count)
        return output

    def count(self, grad: Tensor) -> None:
        self.backwards += 1


class Encoders(NamedTuple):
    """What feeds the pipeline."""

    first: Counting
    second: Counting

    def inputs(self, kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        if kind == "apart":
            return first, self.second(x)
        if kind == "shared":
            return first * 2, self.second(first)
        if kind == "views":
            both = self.second(first.repeat(1, 1))
            return both.view(-1, 4), first[:, [1, 0, 2, 3]]
        if kind == "one frozen":
            with torch.no_grad():
                return first, self.second(x)
        if kind == "the same":
            return first, first
        raise AssertionError(kind)


def encoders() -> Encoders:
    torch.manual_seed(7)
    return Encoders(Counting(4, 4).double(), Counting(4, 4).double())


def joined(num_stages: int, batch: int) -> Model:
    torch.manual_seed(0)
    modules = [Joined().double(), *(Block(4, 4, i % 2).double() for i in range(num_stages - 1))]
    return Model(modules, (torch.randn(batch, 4).double(),), torch.randn(batch, 4).double())


Grads = list[Tensor | None]


def grads_of(fed_by: Encoders, model: Model) -> Grads:
    return [p.grad for module in (*fed_by, model.modules[0]) for p in module.parameters()]


def fed(rank: int, group: dist.ProcessGroup, case: Case, kind: str) -> tuple[Grads, tuple[int, int]] | None:
    model, fed_by = case.build(), encoders()
    mine = case.stages_of(rank, group.size())
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    for _ in range(case.steps):
        for module in (*fed_by, *model.modules):
            module.zero_grad()
        args = fed_by.inputs(kind, *model.inputs) if 0 in mine else ()
        schedule.step(*args, target=model.target if case.num_stages - 1 in mine else None)
    return (grads_of(fed_by, model), (fed_by.first.backwards, fed_by.second.backwards)) if 0 in mine else None


def unsplit(case: Case, kind: str) -> tuple[Grads, tuple[int, int]]:
    model, fed_by = case.build(), encoders()
    for _ in range(case.steps):
        for module in (*fed_by, *model.modules):
            module.zero_grad()
        first, *rest = model.modules
        output = nn.Sequential(*rest)(first(*fed_by.inputs(kind, *model.inputs)))
        loss = model.loss_fn(output, model.target)
        (loss if case.options.get("scale_grads", True) else loss * case.num_microbatches).backward()
    return grads_of(fed_by, model), (fed_by.first.backwards, fed_by.second.backwards)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_module_outside_trains_as_in_the_unsplit_model(schedule: str, compile: Any) -> None:
    case = Case(schedule, 2 if schedule in ONE_STAGE_A_RANK else 4, 4, joined, compile=compile, steps=2)
    grads, backwards = run(2, fed, case, "shared")[0]
    expected, once = unsplit(case, "shared")
    torch.testing.assert_close(grads, expected, **CLOSE)
    assert backwards == once == (2, 2)  # in two steps


@pytest.mark.slow
@pytest.mark.parametrize("scale", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", ["apart", "shared", "views", "one frozen", "the same"])
def test_inputs_may_share_a_graph_or_have_none(kind: str, scale: bool) -> None:
    case = Case("1F1B", 2, 3, joined, options={"scale_grads": scale})
    answer = run(2, fed, case, kind)[0]
    torch.testing.assert_close(list(answer), list(unsplit(case, kind)), **CLOSE)


@pytest.mark.slow
def test_one_microbatch_gives_an_encoder_what_it_gets_from_torchs_stage() -> None:
    grads = [
        run(2, fed, Case("GPipe", 2, 1, joined, torchs=torchs), "shared")[0][0] for torchs in ((), (0, 1))
    ]
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.fixture(scope="module")
def alone() -> Any:
    with one_process():
        yield


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("view", [False, True], ids=["leaf", "view of a leaf"])
def test_an_input_that_is_a_leaf_gets_what_torchs_stage_gives_it(
    microbatches: int, view: bool, alone: Any
) -> None:
    grads = []
    for kind in (PipelineStage, FunctionalPipelineStage):
        torch.manual_seed(0)
        stage = kind(nn.Linear(4, 4), 0, 1, torch.device("cpu"))
        x = torch.randn(8, 4, requires_grad=True)
        schedule = ScheduleGPipe(stage, microbatches, loss_fn=functional.mse_loss)
        schedule.step(x.view(8, 4) if view else x, target=torch.zeros(8, 4))
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_a_step_that_fails_leaves_nothing_for_the_next(alone: Any) -> None:
    torch.manual_seed(0)
    module, encoder = nn.Linear(4, 4), nn.Linear(4, 4)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu")
    x, target = torch.randn(4, 4), torch.randn(4, 4)
    handle = module.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss).step(encoder(x), target=target)
    handle.remove()
    module.zero_grad()
    assert encoder.weight.grad is None
    # A schedule of torch's that has failed keeps its losses, so here is a new one.
    ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss).step(encoder(x), target=target)
    (wanted,) = torch.autograd.grad(functional.mse_loss(module(encoder(x)), target), encoder.weight)
    torch.testing.assert_close(encoder.weight.grad, wanted)
