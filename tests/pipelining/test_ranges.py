"""What a profiler sees of a pipeline: a range for each action, by stage, kind and microbatch."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from one_process import one_process
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleZBVZeroBubble
from torch.profiler import ProfilerActivity, profile

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, pipeline_order, pipeline_value_and_grad
from funcstage.pipelining.ranges import range_of


def ranges(profiled: Any) -> Counter[str]:
    return Counter(event.name for event in profiled.events() if event.name.startswith("stage "))


def named(*actions: tuple[int, str, int]) -> Counter[str]:
    return Counter(f"stage {stage} {kind} mb {microbatch}" for stage, kind, microbatch in actions)


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_every_action_of_a_pipeline_in_one_process_has_a_range(schedule: str) -> None:
    stages = [fs.functionalize(nn.Linear(3, 3)) for _ in range(4)]
    mse = torch.nn.functional.mse_loss
    step = pipeline_value_and_grad(stages, mse, schedule=schedule, num_microbatches=4)
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    x = torch.ones(4, 3)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(params, buffers, x, x)
    order = pipeline_order(schedule, 4, 4)
    assert ranges(profiled) == named(*((a.stage, a.kind, a.microbatch) for r in order.ranks for a in r))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
def test_every_action_of_stages_under_torchs_schedules_has_a_range(folded: bool, compile: Any) -> None:
    mse = torch.nn.functional.mse_loss
    with one_process():
        stages = [
            FunctionalPipelineStage(nn.Linear(3, 3), i, 2, "cpu", compile=compile, loss_fn=mse)
            for i in range(2)
        ]
        loss = stages[-1].loss_fn if folded else mse
        split = ScheduleZBVZeroBubble(stages, 2, loss_fn=loss)  # type: ignore[arg-type]
        x = torch.ones(4, 3)
        split.step(x, target=x)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            split.step(x, target=x)
        assert ranges(profiled) == named(*((s, k, m) for s in range(2) for k in "FIW" for m in range(2)))
        whole = Schedule1F1B(
            FunctionalPipelineStage(nn.Linear(3, 3), 0, 1, "cpu", compile=compile), 2, loss_fn=mse
        )
        whole.step(x, target=x)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            whole.step(x, target=x)
        assert ranges(profiled) == named(*((0, k, m) for k in "FB" for m in range(2)))


def test_where_nobody_listens_no_range_is_made() -> None:
    assert range_of(0, "F", 0) is range_of(1, "W", 2)


def test_a_stage_tells_what_it_is() -> None:
    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(3, 3), 1, 2, "cpu", compile={"backend": "aten"})
    assert repr(stage) == (
        "<FunctionalPipelineStage 1 of 2, module: Linear, parameters: 2 (48 B), device: cpu, "
        "engine: compiled by aten>"
    )
    shown = ElementTree.fromstring(stage._repr_html_())
    assert ["module", "Linear"] in [[cell.text for cell in row] for row in shown.iter("tr")]


def test_the_help_of_the_constructor_is_its_own() -> None:
    text = inspect.getdoc(FunctionalPipelineStage.__init__)
    assert text is not None
    assert "dw_runner" not in text  # of torch's
    assert "docstring of the class" in text
