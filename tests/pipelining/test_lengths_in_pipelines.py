"""Steps of other lengths on one schedule, and microbatches of other lengths in one step."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    Case,
    Model,
    Step,
    assert_same,
    gathered,
    grads_of,
    make_schedule,
    make_stages,
)
from pipeline_ranks import Raised, ranks, run
from shared_memory import over_shared_memory
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, schedules
from torch.nn import functional

from funcstage._torch.pipelining import EVERY_INPUT_RETURNS_A_GRADIENT
from funcstage.errors import LeafError
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage
from funcstage.pipelining.lengths import keep_for
from funcstage.pipelining.plans import agreed_ahead

ATEN = {"backend": "aten"}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
PRE_SPLIT = "arg_mbs" in inspect.signature(schedules.ScheduleGPipe.step).parameters
"""Whether a step takes microbatches that the caller has split."""

Shapes = list[tuple[int, int]]
"""Rows and length of each microbatch of a step."""


class Mixing(nn.Module):
    """Every position sees those before it, so that a wrong length cannot go unnoticed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        return y + y.cumsum(1) / x.shape[1]


def mixing(num_stages: int, batch: int) -> Model:
    torch.manual_seed(0)
    widths = [2 + i % 3 for i in range(num_stages + 1)]
    modules: list[nn.Module] = [Mixing(a, b).double() for a, b in itertools.pairwise(widths)]
    return Model(modules, (), torch.empty(0))


def batch(shapes: Shapes, model: Model) -> tuple[list[Tensor], list[Tensor]]:
    """Microbatches of these shapes, and their targets."""
    widths = model.modules[0].linear.in_features, model.modules[-1].linear.out_features
    torch.manual_seed(sum(rows * length for rows, length in shapes))
    found = [[torch.randn(*shape, width).double() for shape in shapes] for width in widths]
    return found[0], found[1]


def call(schedule: Any, method: str, shapes: Shapes, model: Model, mine: list[int]) -> Step:
    """Run a step, or an evaluation."""
    inputs, targets = batch(shapes, model)
    is_first, is_last = 0 in mine, len(model.modules) - 1 in mine
    losses: list[Tensor] = []
    if len({length for _, length in shapes}) == 1:
        args = (torch.cat(inputs),) if is_first else ()
        target = torch.cat(targets) if is_last else None
        output = getattr(schedule, method)(*args, target=target, losses=losses)
        outputs = [] if output is None else [output.detach()]
    else:  # outputs of several lengths cannot be merged
        given: dict[str, Any] = {} if method == "eval" else {"return_outputs": False}
        given["arg_mbs"] = [(each,) if is_first else () for each in inputs]
        given["target_mbs"] = targets if is_last else None
        getattr(schedule, method)(losses=losses, **given)
        outputs = []
    grads = grads_of(model, mine)
    for i in mine:
        model.modules[i].zero_grad()
    return Step(grads, {}, [loss.detach() for loss in losses], outputs)


Calls = list[tuple[str, Shapes]]


def runs(rank: int, group: dist.ProcessGroup, case: Case, calls: Calls) -> list[Step]:
    model = case.build()
    stages = make_stages(case, model, rank, group)
    mine = [stage.stage_index for stage in stages]
    ours = next((stage for stage in stages if isinstance(stage, FunctionalPipelineStage)), None)
    schedule = make_schedule(case, stages, ours.loss_fn if case.folded and ours else model.loss_fn)
    return [call(schedule, method, shapes, model, mine) for method, shapes in calls]


def expected(case: Case, calls: Calls) -> list[Step]:
    """The same by plain eager autograd."""
    model, done = case.build(), []
    for method, shapes in calls:
        losses, outputs = [], []
        for x, target in zip(*batch(shapes, model), strict=True):
            for module in model.modules:
                x = module(x)
            losses.append(functional.mse_loss(x, target))
            outputs.append(x.detach())
        if method == "step":
            (sum(losses) / len(losses)).backward()
        merged = [torch.cat(outputs)] if len({o.shape[1:] for o in outputs}) == 1 else []
        grads = grads_of(model, range(len(model.modules)))
        done.append(Step(grads, {}, [loss.detach() for loss in losses], merged))
        for module in model.modules:
            module.zero_grad()
    return done


def alike(length: int, number: int = 4) -> Shapes:
    return [(2, length)] * number


UNEVEN: Shapes = [(3, 6), (3, 6), (2, 6), (2, 6)]
VARIED: Shapes = [(2, 6), (2, 3), (2, 6), (1, 5)]

CALLS: Calls = [
    ("step", alike(5)),
    ("step", alike(5)),
    ("step", alike(7)),
    ("eval", alike(3)),
    ("step", alike(3)),
    ("eval", alike(5)),
    ("step", alike(9)),
    ("step", UNEVEN),
    ("eval", UNEVEN),
    ("step", UNEVEN),
    ("step", alike(7)),
    *([("step", VARIED), ("step", alike(4)), ("step", VARIED)] if PRE_SPLIT else []),
]


def stages_for(schedule: str, world_size: int) -> int:
    return world_size if schedule in ONE_STAGE_A_RANK else 2 * world_size


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lengths_may_change_between_steps_and_within_them(schedule: str, compile: Any) -> None:
    case = Case(schedule, stages_for(schedule, 2), 4, mixing, compile=compile, folded=compile is not False)
    assert_same(gathered(run(2, runs, case, CALLS)), expected(case, CALLS), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_four_ranks_agree_about_lengths(schedule: str) -> None:
    calls: Calls = [
        ("eval", alike(3, 8)),
        ("step", alike(5, 8)),
        ("step", alike(4, 8)),
        ("step", alike(5, 8)),
    ]
    calls.append(("step", [(2, 6)] * 5 + [(1, 6)] * 3))
    case = Case(schedule, stages_for(schedule, 4), 8, mixing, compile=ATEN)
    assert_same(gathered(run(4, runs, case, calls)), expected(case, calls), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, {"backend": "aten", "dynamic": True}], ids=["eager", "dynamic"])
def test_all_stages_in_one_process_take_any_length(compile: Any) -> None:
    case = Case("Interleaved1F1B", 3, 4, mixing, compile=compile)
    with one_process() as group:
        assert_same(runs(0, group, case, CALLS), expected(case, CALLS), **CLOSE)


# What is agreed ahead of a step, as where some ranks may replay a graph of it.


def runs_ahead(
    rank: int, group: dist.ProcessGroup, case: Case, calls: Calls
) -> tuple[list[Step], list[bool]]:
    model = case.build()
    stages = make_stages(case, model, rank, group)
    mine = [stage.stage_index for stage in stages]
    schedule = make_schedule(case, stages, model.loss_fn)
    keep_for(schedule, 2)
    found, known = [], []
    for method, shapes in calls:
        x, target = map(torch.cat, batch(shapes, model))
        with agreed_ahead(schedule, method, (x,) if 0 in mine else (), {"target": target}) as agreed:
            known.append(agreed[1])
            found.append(call(schedule, method, shapes, model, mine))
    return found, known


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_going_back_to_a_length_that_was_kept_takes_no_messages(schedule: str) -> None:
    a, b, c = (("step", alike(length)) for length in (5, 7, 6))
    calls: Calls = [a, b, a, ("eval", alike(5)), a, c, b, a]
    case = Case(schedule, stages_for(schedule, 2), 4, mixing)
    answers = run(2, runs_ahead, case, calls)
    assert_same(gathered([steps for steps, _ in answers]), expected(case, calls), **CLOSE)
    # Two are kept: a and b; b and a's evaluation; that and a, once more; a and c; c and b; b and a.
    for _, known in answers:
        assert known == [True, False, True, False, False, False, False, False]


# What is written into the memory of peers.


def over_memory(rank: int, group: dist.ProcessGroup, job: Any, *args: Any) -> tuple[Any, int]:
    with over_shared_memory() as made:
        return job(rank, group, *args), len(made)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_lengths_may_change_where_messages_are_written_into_memory(schedule: str) -> None:
    case = Case(schedule, stages_for(schedule, 2), 4, mixing)
    answers = run(2, over_memory, runs, case, CALLS)
    assert_same(gathered([steps for steps, _ in answers]), expected(case, CALLS), **CLOSE)
    assert [number > 0 for _, number in answers] == [True, True]


@pytest.mark.slow
def test_lengths_that_were_kept_share_their_memory() -> None:
    a, b = (("step", alike(length)) for length in (7, 5))
    calls: Calls = [a, b, a, ("eval", alike(5)), b, a, b]
    case = Case("ZBVZeroBubble", 4, 4, mixing)
    answers = run(2, over_memory, runs_ahead, case, calls)
    assert_same(gathered([steps for (steps, _), _ in answers]), expected(case, calls), **CLOSE)
    assert [number for _, number in answers] == [1, 1]


# What is refused, on every rank.


class Fixed(Mixing):
    """Takes sequences of at most six."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(6, 1, dtype=x.dtype).narrow(0, 0, x.shape[1])


def with_one_that_is_fixed(num_stages: int, batch: int) -> Model:
    model = mixing(num_stages, batch)
    linear = model.modules[1].linear
    model.modules[1] = Fixed(linear.in_features, linear.out_features).double()
    return model


def goes_on(rank: int, group: dist.ProcessGroup, case: Case) -> Step:
    """One step that a stage cannot take, between two that it can."""
    model = case.build()
    stages = make_stages(case, model, rank, group)
    mine = [stage.stage_index for stage in stages]
    schedule = make_schedule(case, stages, model.loss_fn)
    call(schedule, "step", alike(5), model, mine)
    with pytest.raises(LeafError, match=rf"Stage 1 of {case.num_stages} \(Fixed\).*exceeds dimension size"):
        call(schedule, "step", alike(7), model, mine)
    return call(schedule, "step", alike(5), model, mine)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["GPipe", "InterleavedZeroBubble"])
def test_a_length_that_a_stage_cannot_take_is_refused_on_every_rank_and_others_go_on(schedule: str) -> None:
    case = Case(schedule, stages_for(schedule, 2), 4, with_one_that_is_fixed)
    wanted = expected(case, [("step", alike(5))])
    if EVERY_INPUT_RETURNS_A_GRADIENT:  # in torch 2.11 stages are not told what later ones find
        for answer in ranks(2).run(runs, case, [("step", alike(5)), ("step", alike(7))], group_seconds=20):
            assert isinstance(answer, Raised)
            assert f"Stage 1 of {case.num_stages} (Fixed)" in answer.message
    else:
        answers = run(2, goes_on, case)
        assert_same(gathered([[answer] for answer in answers]), wanted, **CLOSE)
    alone = Case("Interleaved1F1B", case.num_stages, 4, with_one_that_is_fixed)
    with one_process() as group:
        assert_same([goes_on(0, group, alone)], wanted, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("torchs", [(1,), (3,)], ids=str)
def test_with_stages_of_torchs_own_a_change_is_refused_on_every_rank(torchs: tuple[int, ...]) -> None:
    case = Case("Interleaved1F1B", 4, 4, mixing, torchs=torchs)
    same: Calls = [("step", alike(5))] * 2
    assert_same(gathered(run(2, runs, case, same)), expected(case, same), **CLOSE)
    for calls in ([*same, ("step", alike(7))], [("step", UNEVEN)]):
        for answer in ranks(2).run(runs, case, calls, group_seconds=20):
            assert isinstance(answer, Raised)
            assert "rank 1 of the pipeline has stages of torch's own" in answer.message


def with_torchs_alone(rank: int, group: dist.ProcessGroup, lengths: list[int]) -> list[Any]:
    model = mixing(2, 8)
    kind = (FunctionalPipelineStage, PipelineStage)[rank]
    stage = kind(model.modules[rank], rank, 2, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss)
    return [call(schedule, "step", alike(length), model, [rank]) for length in lengths]


@pytest.mark.slow
def test_a_rank_with_torchs_stages_alone_is_told_nothing_and_waited_for_by_nobody() -> None:
    calls: Calls = [("step", alike(5))] * 20
    found = gathered(run(2, with_torchs_alone, [5] * 20))
    assert_same(found, expected(Case("GPipe", 2, 4, mixing), calls), **CLOSE)
    answer = ranks(2).run(with_torchs_alone, [5, 7], group_seconds=20)[0]
    assert isinstance(answer, Raised)
    assert "Make all stages FunctionalPipelineStage" in answer.message


class Cutting(Mixing):
    """What it returns depends on a keyword argument."""

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        return super().forward(x)[:, :keep]


def cuts(rank: int, group: dist.ProcessGroup, told: list[int]) -> list[float]:
    torch.manual_seed(0)
    modules = [Cutting(3, 3), Cutting(3, 3), Mixing(3, 3)]
    stage = FunctionalPipelineStage(modules[rank], rank, 3, "cpu", group=group)
    schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
    found = []
    for keep in (4, 3):
        inputs = (torch.ones(4, 5, 3),) if rank == 0 else ()
        target = torch.zeros(4, keep, 3) if rank == 2 else None
        losses: list[Tensor] = []
        given = {"keep": keep if rank in told else None} if rank < 2 else {}
        schedule.step(*inputs, target=target, losses=losses, **given)
        found += [loss.item() for loss in losses]
    return found


@pytest.mark.slow
def test_a_length_that_only_a_later_rank_knows_of_is_refused_with_a_way_out() -> None:
    answers = ranks(3).run(cuts, [1], group_seconds=20)
    for answer in answers:
        assert isinstance(answer, Raised)
        assert "Give the first stage what else it depends on" in answer.message
    losses = run(3, cuts, [0, 1])[2]
    torch.manual_seed(0)
    modules = [Cutting(3, 3), Cutting(3, 3), Mixing(3, 3)]
    for keep, loss in ((4, losses[0]), (3, losses[2])):
        y = modules[2](modules[1](modules[0](torch.ones(4, 5, 3), keep), keep))
        assert loss == pytest.approx(y.square().mean().item())


@pytest.mark.slow
def test_an_error_before_the_first_rank_tells_of_its_microbatches_is_heard_by_all() -> None:
    for answer in ranks(2).run(late_error, group_seconds=20):
        assert isinstance(answer, Raised)
        assert "no more of it" in answer.message


def late_error(rank: int, group: dist.ProcessGroup) -> None:
    model = mixing(2, 8)
    stage = FunctionalPipelineStage(model.modules[rank], rank, 2, "cpu", group=group)
    schedule = ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss)
    call(schedule, "step", alike(5), model, [rank])
    if rank == 0:

        def broken(*args: Any) -> Any:
            raise ValueError("no more of it")

        schedule._check_inputs = broken
    call(schedule, "step", alike(5), model, [rank])
