"""Messages written into the memory of peers, against eager autograd; over memory that processes share."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    Case,
    Step,
    assert_same,
    expected,
    from_csv,
    gathered,
    growing,
    make_schedule,
    make_stages,
    train,
    with_everything,
)
from pipeline_ranks import Raised, ranks, run
from shared_memory import SharedMemory, over_shared_memory
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional

from funcstage.errors import StructureError
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage
from funcstage.pipelining.capture.rehearsal import rehearse
from funcstage.pipelining.transport.choice import Offer, is_symmetric
from funcstage.pipelining.transport.layout import READY, Edge, edges_between, laid_out, numbered

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ATEN = {"backend": "aten"}


def train_over_memory(rank: int, group: dist.ProcessGroup, case: Case) -> tuple[list[Step], int, int]:
    """Run a case, and say how much memory was made and how many signals were put."""
    with over_shared_memory() as made:
        done = train(rank, group, case)
    return done, len(made), sum(memory.puts for memory in made)


def assert_trains_as_eager(world_size: int, case: Case) -> None:
    answers = run(world_size, train_over_memory, case)
    assert_same(gathered([steps for steps, _, _ in answers]), expected(case), **CLOSE)
    for _, memories, puts in answers:
        assert memories == 1
        assert puts >= case.steps * case.backwards * case.num_microbatches


# Every schedule.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_three_steps_are_those_of_the_whole_model_under_any_schedule(schedule: str) -> None:
    stages = 2 if schedule in ONE_STAGE_A_RANK else 4
    assert_trains_as_eager(2, Case(schedule, stages, 4, steps=3))


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_a_step_on_four_ranks_is_that_of_the_whole_model(schedule: str) -> None:
    stages = 4 if schedule in ONE_STAGE_A_RANK else 8
    assert_trains_as_eager(4, Case(schedule, stages, 8, compile=ATEN, steps=2))


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_integers_several_tensors_and_evaluations_travel_too(schedule: str) -> None:
    case = Case(schedule, 4, 4, with_everything, size=3, steps=2, backwards=2, evals=True)
    assert_trains_as_eager(4 if schedule in ONE_STAGE_A_RANK else 2, case)


def test_microbatches_may_be_used_in_another_order_than_they_arrive_in() -> None:
    rows = (
        "0F0 0F1 0F2 0F3 2F0 2F1 2I0 2W0 2F2 2I1 0I0 2F3 2I2 2W1 0I1 0W1 2I3 0I2 2W2 2W3 0W0 0I3 0W2 0W3",
        "1F0 1F1 1F2 1F3 3F0 3I0 3F1 3W0 3I1 1I0 3F2 3I2 1W0 3F3 1I1 3I3 3W1 1I2 3W2 1W1 3W3 1I3 1W3 1W2",
    )
    assert_trains_as_eager(2, Case(rows, 4, 4, growing, compile=ATEN, steps=2))


def train_with_other_lengths(rank: int, group: dist.ProcessGroup) -> list[Any]:
    """Steps of two lengths in turn on one schedule: what the first stage's weight gets, each time."""
    with over_shared_memory() as made:
        torch.manual_seed(0)
        modules = [nn.Linear(3, 3).double() for _ in range(2)]
        stage = FunctionalPipelineStage(modules[rank], rank, 2, "cpu", group=group)
        schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        found = []
        for length in (2, 50, 2, 50):
            x = torch.arange(4 * length * 3).view(4, length, 3).double() / 10
            schedule.step(*[x] * (rank == 0), target=torch.zeros_like(x) if rank == 1 else None)
            model = [nn.Linear(3, 3).double() for _ in range(2)]
            for mine, theirs in zip(model, modules, strict=True):
                mine.load_state_dict(theirs.state_dict())
            functional.mse_loss(model[1](model[0](x)), torch.zeros_like(x)).backward()
            torch.testing.assert_close(modules[rank].weight.grad, model[rank].weight.grad)
            modules[rank].zero_grad()
            found.append(len(made))
    return found


def test_longer_microbatches_get_more_memory_and_shorter_ones_the_same() -> None:
    assert run(2, train_with_other_lengths) == [[1, 2, 2, 2]] * 2


# What is sent when.


def rehearse_between_steps(rank: int, group: dist.ProcessGroup, case: Case) -> list[Step]:
    with over_shared_memory() as made:
        model = case.build()
        stages = make_stages(case, model, rank, group)
        schedule = make_schedule(case, stages, model.loss_fn)
        mine = [stage.stage_index for stage in stages]
        args = model.inputs if 0 in mine else ()
        target = model.target if case.num_stages - 1 in mine else None

        def step() -> Any:
            return schedule.step(*args, target=target, losses=losses)

        done = []
        for _ in range(2):
            losses: list[Tensor] = []
            puts = sum(memory.puts for memory in made)
            rehearse(stages, [p for stage in stages for p in stage.submod.parameters()], step)
            assert sum(memory.puts for memory in made) == puts
            losses = []
            output = step()
            grads = {f"{i}.{n}": p.grad for i in mine for n, p in model.modules[i].named_parameters()}
            found = [] if output is None else [output.detach()]
            done.append(Step(grads, {}, [loss.detach() for loss in losses], found))
            for stage in stages:
                stage.submod.zero_grad()
        return done


def test_a_rehearsal_sends_no_message() -> None:
    case = Case("ZBVZeroBubble", 4, 4)
    wanted = expected(case)[0]._replace(state={})
    assert_same(gathered(run(2, rehearse_between_steps, case)), [wanted, wanted], **CLOSE)


def train_a_slow_last_stage(rank: int, group: dist.ProcessGroup) -> None:
    """The first rank is at its next step while the second one still has to read what it received in this."""
    with over_shared_memory():
        torch.manual_seed(0)
        modules = [nn.Linear(3, 3).double() for _ in range(2)]
        whole = copy.deepcopy(nn.Sequential(*modules))
        modules[1].weight.register_hook(slowly)
        stage = FunctionalPipelineStage(modules[rank], rank, 2, "cpu", group=group)
        rows = ("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1I1 1W0 1W1")
        schedule = from_csv(rows, [stage], 2, functional.mse_loss)
        for _ in range(3):
            x = torch.randn(2, 3).double()
            schedule.step(*[x] * (rank == 0), target=x if rank == 1 else None)
            functional.mse_loss(whole(x), x).backward()
            torch.testing.assert_close(modules[rank].weight.grad, whole[rank].weight.grad)
            modules[rank].zero_grad()
            whole.zero_grad()


def slowly(grad: Tensor) -> Tensor:
    time.sleep(0.3)
    return grad


def test_nothing_is_overwritten_that_is_still_needed() -> None:
    run(2, train_a_slow_last_stage)


class Failing(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu":
            self.calls -= 1
            if self.calls < 0:
                raise ValueError("out of luck")
        return self.linear(x)


def fail_in_the_third_step(rank: int, group: dist.ProcessGroup) -> None:
    with over_shared_memory():
        module = Failing(4) if rank == 1 else nn.Linear(3, 3)
        stage = FunctionalPipelineStage(module, rank, 2, "cpu", group=group)
        schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        for _ in range(4):
            x = torch.randn(2, 3)
            schedule.step(*[x] * (rank == 0), target=x if rank == 1 else None)


def test_a_rank_that_fails_ends_the_wait_of_the_others_in_bounded_time() -> None:
    first, second = ranks(2).run(fail_in_the_third_step, group_seconds=5)
    assert isinstance(first, Raised)
    assert isinstance(second, Raised)
    assert "out of luck" in second.message
    assert "timed out" in first.message or "out of luck" in first.message


# What is decided.


def told_on(rank: int, group: dist.ProcessGroup, transports: list[str], reach: bool, torchs: int) -> int:
    """Run a step, and say how much memory was made."""
    with over_shared_memory(reach) as made:
        torch.manual_seed(0)
        module: Any = nn.Linear(3, 3)
        if rank == torchs:
            stage: Any = PipelineStage(module, rank, 2, torch.device("cpu"), group=group)
        else:
            options: Any = {"transport": transports[rank]}
            stage = FunctionalPipelineStage(module, rank, 2, "cpu", group=group, **options)
        dist.barrier(group)
        schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        x = torch.ones(2, 3)
        schedule.step(*[x] * (rank == 0), target=x if rank == 1 else None)
        return len(made)


@pytest.mark.parametrize(
    ("transports", "reach", "torchs", "memories"),
    [
        (["auto", "auto"], True, -1, 1),
        (["symmetric", "auto"], True, -1, 1),
        (["auto", "nccl"], True, -1, 0),
        (["nccl", "nccl"], True, -1, 0),
        (["auto", "auto"], False, -1, 0),
        (["auto", "auto"], True, 0, 0),
        (["auto", "auto"], True, 1, 0),
    ],
)
def test_all_ranks_send_in_the_same_way(
    transports: list[str], reach: bool, torchs: int, memories: int
) -> None:
    assert run(2, told_on, transports, reach, torchs) == [memories, memories]


@pytest.mark.parametrize(
    ("transports", "reach", "said"),
    [
        (
            ["symmetric", "nccl"],
            True,
            "rank 0 of the pipeline wants transport='symmetric', but rank 1 has st",
        ),
        (
            ["nccl", "symmetric"],
            True,
            "rank 1 of the pipeline wants transport='symmetric', but rank 0 has st",
        ),
        (["symmetric", "symmetric"], False, "does not reach the memory of rank"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank_before_the_first_message(
    transports: list[str], reach: bool, said: str
) -> None:
    for answer in ranks(2).run(told_on, transports, reach, -1):
        assert isinstance(answer, Raised)
        assert "StageError" in answer.kinds
        assert said in answer.message


class Full(SharedMemory):
    def __init__(self, nbytes: int, signals: int, group: Any, device: torch.device) -> None:
        raise RuntimeError("there is none left")


def without_memory(rank: int, group: dist.ProcessGroup, transport: Any) -> Tensor:
    with over_shared_memory(on=Full):
        torch.manual_seed(0)
        stage = FunctionalPipelineStage(nn.Linear(3, 3), rank, 2, "cpu", group=group, transport=transport)
        schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        x = torch.ones(2, 3)
        schedule.step(*[x] * (rank == 0), target=x if rank == 1 else None)
        grad = stage.submod.weight.grad
        assert isinstance(grad, Tensor)
        return grad


def test_where_there_is_no_memory_messages_go_through_the_group_or_not_at_all() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 3)
    torch.manual_seed(0)
    second = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    functional.mse_loss(second(first(x)), x).backward()
    answers = run(2, without_memory, "auto")
    torch.testing.assert_close(answers, [first.weight.grad, second.weight.grad])
    for answer in ranks(2).run(without_memory, "symmetric"):
        assert isinstance(answer, Raised)
        assert "StageError" in answer.kinds
        assert "there is none left" in answer.message


def test_a_stage_refuses_transports_that_there_are_not() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        wrong: Any = "ib"
        with pytest.raises(StructureError, match="got 'ib'"):
            FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", transport=wrong)
        with pytest.raises(StructureError, match="needs CUDA devices"):
            FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", transport="symmetric")
    finally:
        dist.destroy_process_group()


def test_ranks_on_two_hosts_send_through_the_process_group() -> None:
    auto = Offer(frozenset({"auto"}), ("a", "gpu 0", ("gpu 1",)))
    near, far = ("a", "gpu 1", ("gpu 0",)), ("b", "gpu 1", ("gpu 0",))
    assert is_symmetric({0: auto, 1: dataclasses.replace(auto, place=near)})
    assert not is_symmetric({0: auto, 1: dataclasses.replace(auto, place=far)})
    assert not is_symmetric({0: auto, 1: None})
    assert not is_symmetric({0: auto})
    with pytest.raises(StructureError, match="two hosts"):
        is_symmetric({0: auto, 1: Offer(frozenset({"symmetric"}), far)})


# Where messages lie.


@st.composite
def placements(draw: st.DrawFn) -> dict[int, int]:
    stages = draw(st.integers(1, 12))
    world = draw(st.integers(1, 4))
    return {stage: draw(st.integers(0, world - 1)) for stage in range(stages)}


@given(placements(), st.integers(1, 5))
@settings(deadline=None)
def test_signals_of_two_ranks_are_told_apart(rank_of: dict[int, int], microbatches: int) -> None:
    numbers = numbered(rank_of, microbatches)
    ends = {
        (edge, chunk): (rank_of[edge.source], rank_of[edge.target])[:: -1 if chunk == READY else 1]
        for edge, chunk in numbers
    }
    assert all(a != b for a, b in ends.values())
    used = [(ends[key], number) for key, number in numbers.items()]
    assert len({*used}) == len(used)
    for pair in {*ends.values()}:
        assert sorted(n for way, n in used if way == pair) == [*range(sum(way == pair for way, _ in used))]
    assert {edge for edge, _ in numbers} == {*edges_between(rank_of)}


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])


@given(st.lists(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_no_two_tensors_share_a_place(messages: list[list[tuple[list[Any], torch.dtype]]]) -> None:
    given = {
        Edge(i, i + 1): [
            [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for shapes, dtype in chunks
        ]
        for i, chunks in enumerate(messages)
    }
    slots, nbytes = laid_out(given)
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    found = [slot for chunks in slots.values() for chunk in chunks for slot in chunk]
    values = [torch.full(slot.shape, i % 2, dtype=slot.dtype) for i, slot in enumerate(found)]
    for slot, value in zip(found, values, strict=True):
        slot.of(memory).copy_(value)
    for slot, value in zip(found, values, strict=True):
        torch.testing.assert_close(slot.of(memory), value)
    for (edge, chunks), (other, wanted) in zip(slots.items(), given.items(), strict=True):
        assert edge == other
        for chunk, tensors in itertools.zip_longest(chunks, wanted):
            assert [(s.shape, s.dtype) for s in chunk] == [(tuple(t.shape), t.dtype) for t in tensors]
