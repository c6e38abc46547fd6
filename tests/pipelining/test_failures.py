"""Ranks that disagree, and ranks whose module was changed, are refused by name on every rank, and soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_cases import ONE_STAGE_A_RANK, Case, make_schedule, make_stages
from pipeline_ranks import GROUP_SECONDS, Raised, ranks, run
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional

from funcstage.pipelining import FunctionalPipelineStage, plans

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

ATEN = {"backend": "aten"}


def assert_all_refuse(answers: list[Any], message: str) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, Raised), (rank, answer)
        assert "StageError" in answer.kinds, (rank, answer)
        assert message in answer.message, (rank, answer)


def answers_of(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What each rank answers; one that waits for another in vain has an error of the group's, not ours."""
    return ranks(world).run(job, *args)


def stage(i: int, num_stages: int, group: dist.ProcessGroup, dtype: torch.dtype = torch.float32) -> Any:
    return FunctionalPipelineStage(nn.Linear(4, 4, dtype=dtype), i, num_stages, "cpu", group=group)


Options = dict[str, Any]


def runs(rank: int, group: dist.ProcessGroup, options: list[Options]) -> None:
    mine = {
        "schedule": "1F1B",
        "num_stages": group.size(),
        "stages": [rank],
        "microbatches": 4,
        "loss": functional.mse_loss,
        "scale_grads": True,
        "wait": 0.0,
        "dtype": torch.float32,
        "features": 4,
        **options[rank],
    }
    time.sleep(mine["wait"])  # so that either rank is the first once
    made = []
    for i in mine["stages"]:
        module = nn.Linear(mine["features"], mine["features"], dtype=mine["dtype"])
        made.append(FunctionalPipelineStage(module, i, mine["num_stages"], "cpu", group=group))
    kind = schedules.get_schedule_class(mine["schedule"])
    given = made[0] if mine["schedule"] in ONE_STAGE_A_RANK else made
    schedule = kind(given, mine["microbatches"], loss_fn=mine["loss"], scale_grads=mine["scale_grads"])
    x = torch.randn(8, mine["features"], dtype=mine["dtype"])
    schedule.step(*([x] if 0 in mine["stages"] else []), target=x)


TWO = {"stages": [0, 2], "num_stages": 4, "schedule": "Interleaved1F1B"}
OTHER_TWO = {**TWO, "stages": [1, 3]}
MISMATCHES: dict[str, tuple[Options, Options, str]] = {
    "microbatches": ({"microbatches": 4}, {"microbatches": 2}, "the number of microbatches: 4 and 2"),
    "schedules": (
        {"schedule": "GPipe"},
        {"schedule": "1F1B"},
        "the schedule: ScheduleGPipe and Schedule1F1B",
    ),
    "stages": ({}, {"num_stages": 3, "stages": [1]}, "the number of stages: 2 and 3"),
    "stages a rank": (TWO, {"stages": [1]}, "the number of stages: 4 and 2"),
    "split schedules": (
        TWO,
        {**OTHER_TWO, "schedule": "InterleavedZeroBubble"},
        "the schedule: ScheduleInterleaved1F1B and ScheduleInterleavedZeroBubble",
    ),
    "the same stage": ({"stages": [1]}, {"stages": [1]}, "where stage 1 is"),
    "scale_grads": ({}, {"scale_grads": False}, "scale_grads: True and False"),
    "dtypes": ({}, {"dtype": torch.float64}, "must have the same dtype"),
    "half": ({"dtype": torch.bfloat16}, {}, "must have the same dtype"),
    "shapes": ({}, {"features": 5}, "its forward fails on the inputs that it gets"),
}


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_disagree_all_say_about_what(name: str, later: int) -> None:
    first, second, message = MISMATCHES[name]
    options = [dict(first), dict(second)]
    options[later]["wait"] = 1.0
    answers = answers_of(2, runs, options)
    assert_all_refuse(answers, message)


def test_one_of_four_ranks_that_disagrees_is_heard_by_all() -> None:
    options: list[Options] = [{}, {}, {}, {"microbatches": 8}]
    answers = answers_of(4, runs, options)
    assert_all_refuse(answers, "the number of microbatches")


def several_schedules(rank: int, group: dist.ProcessGroup) -> None:
    """Ranks agree anew about each schedule."""
    for microbatches in (2, 4):
        for name in ONE_STAGE_A_RANK:
            schedule = schedules.get_schedule_class(name)(
                stage(rank, 2, group), microbatches, loss_fn=functional.mse_loss
            )
            for _ in range(2):
                schedule.step(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))
                schedule.eval(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))


def test_ranks_that_agree_may_run_one_schedule_after_the_other() -> None:
    run(2, several_schedules)


# Modules that change, and errors in the midst of a step.


def changes(rank: int, group: dist.ProcessGroup, case: Case, of: int, change: str) -> list[Any]:
    model = case.build()
    mine = case.stages_of(rank, group.size())
    if change == "thaw":
        model.modules[of].requires_grad_(False)
    made = make_stages(case, model, rank, group)
    schedule = make_schedule(case, made, model.loss_fn)
    grads = []
    for step in range(2):
        changed = next((s for s in made if s.stage_index == of), None) if step else None
        if changed is not None:
            CHANGES[change](changed)
            grads = [None if p.grad is None else p.grad.clone() for p in changed.submod.parameters()]
        try:
            schedule.step(
                *(model.inputs if 0 in mine else ()),
                target=model.target if case.num_stages - 1 in mine else None,
            )
        except Exception:
            if changed is not None and grads:
                now = [p.grad for p in changed.submod.parameters()]
                torch.testing.assert_close(now, grads)  # nothing was added
            raise
    return []


def thaw(stage: Any) -> None:
    stage.submod.requires_grad_(True)


def widen(stage: Any) -> None:
    stage.submod.rest.append(nn.Linear(stage.submod.first.out_features, 17).double())


def narrow_the_input(stage: Any) -> None:
    stage.submod.first = nn.Linear(2, stage.submod.first.out_features).double()


def cast(stage: Any) -> None:
    stage.submod.float()


def wrap(stage: Any) -> None:
    stage.submod = nn.DataParallel(stage.submod)


CHANGES: dict[str, Callable[[Any], None]] = {
    "thaw": thaw,
    "widen": widen,
    "narrow the input": narrow_the_input,
    "cast": cast,
    "wrap": wrap,
}
SAID = {
    "thaw": "parameters that were frozen now require grad",
    "widen": "the next stage was told",
    "narrow the input": "its forward fails on the inputs that it gets",
    "cast": "must have the same dtype",
    "wrap": "DataParallel",
}


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_that_does_not_fit_is_refused_on_every_rank(change: str, compile: Any) -> None:
    case = Case("1F1B", 2, 4, compile=compile)
    answers = answers_of(2, changes, case, 0, change)
    assert_all_refuse(answers, SAID[change])


@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_it_is_refused_wherever_the_stage_is(schedule: str, of: int) -> None:
    answers = answers_of(2, changes, Case(schedule, 4, 4), of, "widen")
    assert_all_refuse(answers, "the next stage was told")


class Stumbling(nn.Linear):
    """Fails in its second step."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 4:
            raise KeyError("of the user")
        return super().forward(x)


def stumbles(rank: int, group: dist.ProcessGroup, at: int) -> None:
    module = Stumbling(4, 4) if rank == at else nn.Linear(4, 4)
    made = FunctionalPipelineStage(module, rank, group.size(), "cpu", group=group)
    schedule = schedules.Schedule1F1B(made, 4, loss_fn=functional.mse_loss)
    for _ in range(2):
        schedule.step(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_in_the_midst_of_a_step_is_heard_on_every_rank(at: int) -> None:
    answers = answers_of(3, stumbles, at)
    assert "KeyError" in answers[at].kinds  # the user's own, where it happened
    others = [answer for rank, answer in enumerate(answers) if rank != at]
    assert_all_refuse(others, f"Stage {at} of 3 has failed: KeyError: 'of the user'")


def mixed(rank: int, group: dist.ProcessGroup) -> None:
    kind: Any = FunctionalPipelineStage if rank else PipelineStage
    made = kind(nn.Linear(4, 4), rank, 2, torch.device("cpu"), group=group)
    schedule = schedules.Schedule1F1B(made, 4, loss_fn=functional.mse_loss)
    schedule.step(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))


def test_a_rank_with_torchs_stages_alone_is_no_reason_to_refuse() -> None:
    run(2, mixed)


def test_plans_name_what_differs() -> None:
    plan = plans.Plan("ScheduleGPipe", 2, 4, True, True, (0,))
    other = plans.Plan("ScheduleGPipe", 2, 4, True, False, (1,))
    assert plan.disagreement(other) == "whether the schedule has a loss_fn: True and False"
    assert not plan.disagreement(plans.Plan("ScheduleGPipe", 2, 4, True, True, (1,)))


# Constructors that fail.


class Untold(ValueError):
    """A user's own error."""


class Refusing(nn.Linear):
    """Cannot be walked, so that the stage's constructor fails with the user's error."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        raise Untold("of the user")


FAILING: dict[str, tuple[Callable[..., Any], str]] = {
    "another device": (
        lambda i, n, group: FunctionalPipelineStage(nn.Linear(4, 4), i, n, "cuda:7", group=group),
        "but the stage's device is cuda:7",
    ),
    "dw_builder": (
        lambda i, n, group: FunctionalPipelineStage(
            nn.Linear(4, 4), i, n, "cpu", group=group, dw_builder=lambda: None
        ),
        "dw_builder must be None",
    ),
    "wrapped": (
        lambda i, n, group: FunctionalPipelineStage(
            nn.DataParallel(nn.Linear(4, 4)), i, n, "cpu", group=group
        ),
        "DataParallel",
    ),
    "position": (
        lambda i, n, group: FunctionalPipelineStage(nn.Linear(4, 4), i + n, n, "cpu", group=group),
        "stage_index must be one of",
    ),
    "the user's": (
        lambda i, n, group: FunctionalPipelineStage(Refusing(4, 4), i, n, "cpu", group=group),
        "Untold: of the user",
    ),
}


def constructs(rank: int, group: dist.ProcessGroup, at: int, name: str, late: float) -> Any:
    """Rank `at` fails, the others come later. Then all try again in the same group."""
    said, seconds = "", 0.0
    for attempt in range(2):
        if attempt and rank == at:
            time.sleep(1.5)  # until all have heard of it
        if not attempt and rank != at:
            time.sleep(late)
        began = time.monotonic()
        try:
            make = FAILING[name][0] if rank == at and not attempt else stage
            made = make(rank, group.size(), group)
            schedule = schedules.Schedule1F1B(made, 4, loss_fn=functional.mse_loss)
            schedule.step(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))
        except Exception as error:
            if attempt:
                raise
            said, seconds = f"{type(error).__name__}: {error}", time.monotonic() - began
    return said, seconds


@pytest.mark.parametrize(
    ("name", "at", "late"),
    [*((name, 1, 0.5) for name in FAILING), ("the user's", 0, 0.5), ("the user's", 2, 0.5)],
)
def test_a_constructor_that_fails_is_heard_on_every_rank_and_all_may_try_again(
    name: str, at: int, late: float
) -> None:
    answers = answers_of(3, constructs, at, name, late)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, Raised), (rank, answer)
        said, seconds = answer
        assert FAILING[name][1] in said, (rank, said)
        if rank != at:
            assert f"Rank {at} of the pipeline could not construct stage" in said
            assert seconds < GROUP_SECONDS / 2  # not by waiting in vain


def constructs_late(rank: int, group: dist.ProcessGroup, at: int) -> None:
    if rank == at:
        time.sleep(2.0)
        FAILING["the user's"][0](rank, group.size(), group)
    made = stage(rank, group.size(), group)
    schedule = schedules.Schedule1F1B(made, 4, loss_fn=functional.mse_loss)
    schedule.step(*([torch.randn(8, 4)] if rank == 0 else []), target=torch.randn(8, 4))


@pytest.mark.parametrize("at", [0, 1])
def test_a_constructor_that_fails_while_others_wait_for_its_messages_wakes_them(at: int) -> None:
    answers = answers_of(2, constructs_late, at)
    assert "Untold" in answers[at].kinds
    assert_all_refuse([answers[1 - at]], f"Rank {at} of the pipeline could not construct stage {at} of 2")
