"""Orders of ours under torch's runtime: pieces of W and pullbacks that wait in host memory, against eager."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pipeline_cases as cases
import pytest
import torch
import torch.distributed as dist
from captured_runs import TRAINING, Run, recorded
from one_process import one_process
from pipeline_ranks import Raised, ranks, run
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import funcstage as fs
from funcstage import away
from funcstage.pipelining import (
    Action,
    Costs,
    FunctionalPipelineStage,
    Order,
    ScheduleError,
    find_schedule,
    pipeline_order,
    torch_schedule,
)
from funcstage.pipelining.stays import stays_everywhere

ROUNDING = {"rtol": 1e-10, "atol": 1e-12}
ATEN = {"backend": "aten"}
UNEVEN = [Costs(1, 2, 1.5, 10, 10), Costs(2, 2, 1, 10, 10), Costs(1, 1, 2, 10, 10), Costs(1, 2, 2, 10, 10)]

FOUND = find_schedule(UNEVEN, 2, 6, seconds=0)
"""Two stages a rank in a V."""

PIECES = cases.in_pieces(FOUND, 3)
ON_ONE_RANK = cases.on_one_rank(PIECES)


def train_away(rank: int, group: dist.ProcessGroup, case: cases.Case) -> tuple[list[cases.Step], int]:
    """Run a case as if the CPU's memory were a device's, and count what is sent to the host."""
    with mock.patch.object(away, "FAR", ("cpu",)), mock.patch.object(away, "_sent", wraps=away._sent) as sent:
        steps = cases.train(rank, group, case)
    return steps, sent.call_count


W_LAST = Order(
    "W last", 2, 6, tuple(tuple(Action(kind, i, m) for kind in "FIW" for m in range(6)) for i in range(2))
)
CASES = {
    "pieces": cases.Case(PIECES, 4, 6, steps=2),
    "pieces, compiled, folded loss": cases.Case(PIECES, 4, 6, compile=ATEN, folded=True, steps=2),
    "pieces and hooks": cases.Case(PIECES, 4, 6, hooks=True),
    "pieces that are whole": cases.Case(FOUND, 4, 6, evals=True),
    "pieces of whole backwards": cases.Case(cases.in_pieces(pipeline_order("ZBVZeroBubble", 4, 4), 2), 4, 4),
    "pieces away": cases.Case(PIECES, 4, 6, offload="IW", compile=ATEN),
    "W away": cases.Case(W_LAST, 2, 6, offload="W", steps=2, evals=True),
    "ZB-V away, compiled": cases.Case("ZBVZeroBubble", 4, 6, offload="IW", compile=ATEN, folded=True),
    "GPipe away": cases.Case("GPipe", 2, 6, offload="IW", compile=ATEN, steps=2),
    "interleaved away, a stage of torch's": cases.Case(
        "InterleavedZeroBubble", 4, 4, offload="IW", torchs=(1,)
    ),
    "buffers that change, away": cases.Case("ZBVZeroBubble", 4, 4, cases.growing, offload="IW"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_losses_and_states_are_those_of_eager(name: str) -> None:
    case = CASES[name]
    answers = run(2, train_away, case)
    cases.assert_same(cases.gathered([steps for steps, _ in answers]), cases.expected(case), **ROUNDING)
    assert any(count > 0 for _, count in answers) == (case.offload is not None)


@pytest.mark.parametrize("offload", ["W", "IW"])
def test_what_waits_is_what_the_order_gives_time_to(offload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(away, "FAR", ("cpu",))
    order = ON_ONE_RANK
    expected = {made for made in stays_everywhere(order, offload).after if made.stage != 2}
    gone, live = set(), {"most": 0}
    with one_process():
        stages = [
            FunctionalPipelineStage(nn.Linear(3, 3), i, 4, "cpu", offload=None if i == 2 else offload)
            for i in range(4)
        ]
        schedule = torch_schedule(order, stages, functional.mse_loss)
        made = _noted(stages, gone, live)
        next(made)
        schedule.step(torch.randn(12, 3), target=torch.randn(12, 3))
        next(made, None)
    assert gone == expected
    assert expected
    assert 0 < live["most"] <= 3  # on its way beside as many actions


def _noted(stages: list[Any], gone: set[Action], live: dict[str, int]) -> Iterator[None]:
    """Note which pullbacks are offloaded in a step, and how many keep their old memory at a time."""
    from funcstage.pipelining.waiting import Waiting

    made = Waiting.made

    def note(waiting: Waiting, action: Action) -> None:
        made(waiting, action)
        if action in waiting._sent:
            gone.add(action)
        live["most"] = max(live["most"], len([s for s in waiting._sent.values() if s.leaving]))

    with mock.patch.object(Waiting, "made", note):
        yield


def test_pieces_are_named_in_a_trace_and_run_in_the_order_of_the_table() -> None:
    order = ON_ONE_RANK
    with one_process():
        stages = [FunctionalPipelineStage(cases.Block(3, 3, 2), i, 4, "cpu") for i in range(4)]
        schedule = torch_schedule(order, stages, functional.mse_loss)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            schedule.step(torch.randn(6, 3), target=torch.randn(6, 3))
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    named = [
        m for e in events if (m := re.fullmatch(r"stage (\d) ([FIWB]) mb (\d)(, piece \d of 3)?", e.name))
    ]
    found = [Action(m[2], int(m[1]), int(m[3])) for m in named]  # type: ignore[arg-type]
    assert found == list(order.ranks[0])
    numbers: dict[Action, list[str]] = {}
    for action, m in zip(found, named, strict=True):
        if action.kind == "W":
            numbers.setdefault(action, []).append(m[4])
    assert {*map(tuple, numbers.values())} == {(", piece 1 of 3", ", piece 2 of 3", ", piece 3 of 3")}


def test_an_error_between_the_pieces_says_which_microbatches_are_there_in_part() -> None:
    order = Order("mine", 1, 2, (_actions("F0 F1 I0 W0 I1 W1 W1 W0"),), 2)
    with one_process():
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        stage = FunctionalPipelineStage(module, 0, 1, "cpu")
        schedule = torch_schedule(order, stage, functional.mse_loss)
        schedule.step(torch.randn(4, 3), target=torch.randn(4, 3))
        fourth = mock.Mock(side_effect=[None] * 3 + [RuntimeError("fourth")])
        accumulate = stage._accumulate_directly

        def failing(pullback: Any) -> None:
            fourth()
            accumulate(pullback)

        stage._accumulate_directly = failing  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="fourth") as caught:
            schedule.step(torch.randn(4, 3), target=torch.randn(4, 3))
    assert "gradients of microbatch(es) 1 and of microbatch 0 in part" in caught.value.__notes__[-1]


def _actions(text: str) -> tuple[Action, ...]:
    return tuple(Action(unit[0], 0, int(unit[1:])) for unit in text.split())  # type: ignore[arg-type]


def average_pieces(rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """A stage whose W is in pieces, on two replicas."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    alone = dist.new_group([rank], use_local_synchronization=True)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=alone, data_parallel=group)
    order = Order("mine", 1, 2, (_actions("F0 F1 I0 W0 I1 W1 W1 W0"),), 2)
    schedule = torch_schedule(order, stage, functional.mse_loss)
    torch.manual_seed(1)
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    schedule.step(x[rank], target=y[rank])
    dist.destroy_process_group(alone)
    return {name: parameter.grad for name, parameter in module.named_parameters()}  # type: ignore[misc]


@pytest.mark.slow
def test_replicas_average_after_the_last_piece() -> None:
    first, second = run(2, average_pieces)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    torch.manual_seed(1)
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    functional.mse_loss(module(x.flatten(0, 1)), y.flatten(0, 1)).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad, **ROUNDING)
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


def run_other_orders(rank: int, group: dist.ProcessGroup) -> None:
    """The ranks were given different orders of the same stages."""
    order = pipeline_order(("ZBVZeroBubble", "DualPipeV")[rank], 4, 4)
    model = cases.uneven(4, 8)
    stages = [
        FunctionalPipelineStage(model.modules[i], i, 4, "cpu", group=group) for i in order.stages_of(rank)
    ]
    schedule = torch_schedule(order, stages, model.loss_fn)
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank == 0 else None)


@pytest.mark.slow
def test_ranks_with_different_orders_are_told_before_they_wait_for_each_other() -> None:
    for answer in ranks(2).run(run_other_orders):
        assert isinstance(answer, Raised)
        assert "disagree about the order of the actions" in answer.message


@pytest.fixture
def stage() -> Iterator[Any]:
    with one_process():
        yield FunctionalPipelineStage(nn.Linear(3, 3), 0, 1, "cpu")


WHOLE = Order("mine", 1, 2, (_actions("F0 I0 W0 F1 I1 W1"),))


@pytest.mark.parametrize(
    ("order", "error", "says"),
    [
        ("ZBVZeroBubble", fs.StructureError, "order must be an Order, got str. find_schedule"),
        (
            pipeline_order("GPipe", 2, 2),
            ScheduleError,
            "GPipe is an order of 2 stages, but the pipeline has 1",
        ),
        (
            Order("mine", 1, 1, (_actions("F0 B0"), ())),
            ScheduleError,
            "mine is an order of 2 ranks, but the pipeline has 1",
        ),
        (Order("mine", 1, 1, (_actions("F0 I0"),)), ScheduleError, "mine: 0W0 is missing"),
        (Order("mine", 1, 1, (_actions("F0 W0 I0"),)), ScheduleError, "wait"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(stage: Any, order: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        torch_schedule(order, stage, functional.mse_loss)


def test_stages_that_the_order_has_elsewhere_are_refused() -> None:
    with one_process():
        stages = [FunctionalPipelineStage(nn.Linear(3, 3), i, 2, "cpu") for i in (0,)]
        with pytest.raises(ScheduleError, match=r"has the stages \[0, 1\] on rank 0, but got \[0\]"):
            torch_schedule(find_schedule(UNEVEN[:2], 1, 2, seconds=0), stages, functional.mse_loss)


def test_pieces_of_a_stage_of_torchs_are_refused() -> None:
    order = Order("mine", 1, 2, (_actions("F0 F1 I0 W0 I1 W1 W1 W0"),), 2)
    with one_process():
        theirs = PipelineStage(nn.Linear(3, 3), 0, 1, torch.device("cpu"))
        with pytest.raises(fs.StructureError, match="stage 0 is a PipelineStage, whose W cannot be cut"):
            torch_schedule(order, theirs, functional.mse_loss)
        torch_schedule(WHOLE, theirs, functional.mse_loss).step(torch.ones(2, 3), target=torch.ones(2, 3))


@pytest.mark.parametrize("offload", ["I", True, 1, ""])
def test_a_stage_is_not_told_to_offload_what_is_no_choice(offload: Any) -> None:
    with one_process(), pytest.raises(fs.StructureError, match='offload must be "W" for'):
        FunctionalPipelineStage(nn.Linear(3, 3), 0, 1, "cpu", offload=offload)


def test_a_schedule_without_a_table_is_no_order_to_offload_by() -> None:
    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(3, 3), 0, 1, "cpu", offload="W")
        schedule = schedules.ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        schedule.pipeline_order = None
        with pytest.raises(fs.StructureError, match="ScheduleGPipe has none that can be read"):
            schedule.step(torch.ones(2, 3), target=torch.ones(2, 3))
        schedule.eval(torch.ones(2, 3), target=torch.ones(2, 3))


def test_captured_steps_of_stages_that_offload_run_as_they_are_and_say_so() -> None:
    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(3, 3), 0, 1, "cpu", offload="IW")
        schedule = schedules.ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss)
        fast, recorder = recorded(schedule)
        with pytest.warns(UserWarning, match="stage 0 has offload='IW', and a graph's memory stays its own"):
            _ = [fast.step(torch.ones(4, 3), target=torch.ones(4, 3)) for _ in range(5)]
    assert recorder.replays == 0


def test_captured_steps_run_pieces() -> None:
    case = cases.Case(ON_ONE_RANK, 4, 6)
    with one_process() as group:
        plain, fast = Run(case, group, capture=False), Run(case, group, capture=True)
        for number, what in enumerate(TRAINING):
            torch.testing.assert_close(fast.do(what, number), plain.do(what, number), rtol=0, atol=0)
        assert fast.recorder is not None
        assert fast.recorder.replays > 0
