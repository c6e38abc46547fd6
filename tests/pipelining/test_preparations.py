"""Schedules that drive the same stages in turn, each with microbatches of its own number and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from pipeline_cases import Case, Step, assert_same, expected, gathered, grads_of, make_schedule, make_stages
from pipeline_ranks import run

ATEN = {"backend": "aten"}


def in_turn(rank: int, group: dist.ProcessGroup, cases: list[Case]) -> list[Step]:
    """Two steps of each schedule, on the stages of the first."""
    model = cases[0].build()
    stages = make_stages(cases[0], model, rank, group)
    mine = [stage.stage_index for stage in stages]
    driving = [make_schedule(case, stages, model.loss_fn) for case in cases]
    done = []
    for case, schedule in [*zip(cases, driving, strict=True)] * 2:
        inputs, target = case.build()[1:3]
        losses: list[Any] = []
        is_last = case.num_stages - 1 in mine
        output = schedule.step(
            *(inputs if 0 in mine else ()), target=target if is_last else None, losses=losses
        )
        outputs = [] if output is None else [output]
        done.append(Step(grads_of(model, mine), {}, [loss.detach() for loss in losses], outputs))
        for stage in stages:
            stage.submod.zero_grad()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize(
    ("names", "num_stages"),
    [(("GPipe", "1F1B", "GPipe"), 2), (("Interleaved1F1B", "InterleavedZeroBubble", "LoopedBFS"), 4)],
    ids=["a stage a rank", "two stages a rank"],
)
def test_schedules_that_drive_the_same_stages_in_turn_each_train_as_eager(
    names: tuple[str, ...], num_stages: int, compile: Any
) -> None:
    numbers = (2, 4, 6), (3, 2, 1)
    cases = [
        Case(name, num_stages, number, size=size, compile=compile)
        for name, number, size in zip(names, *numbers, strict=True)
    ]
    found = gathered(run(2, in_turn, cases))
    wanted = [expected(case)[0]._replace(state={}) for case in cases]
    assert_same(found, wanted * 2, rtol=1e-10, atol=1e-12)
