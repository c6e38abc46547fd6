"""Any schedule of any stages, captured: to the last bit what it computes as it is, whatever is done in
between.

Steps are recorded on the CPU (`recorded_on_host`), where a replay runs the operations of a step and no
Python.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captured_runs import TRAINING, Run, assert_same
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from one_process import one_process
from pipeline_cases import ONE_STAGE_A_RANK, V_SHAPED, Case, Model
from recorded_on_host import on_host
from torch import nn
from torch.nn.functional import mse_loss

import funcstage as fs
from funcstage.pipelining import SCHEDULES, pipeline_value_and_grad
from funcstage.testing import strategies

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*before each of the last 3 steps:UserWarning"),
]

DOING = st.lists(
    st.sampled_from(["step", "step", "quiet", "eval", "clear", "clear", "zero", "replace", "toggle", "fail"])
)
"""What is done to a schedule and its modules."""


class Residual(nn.Module):
    """A generated module as a stage: rows in, rows of the same shape out."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.drop = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Any) -> Any:
        y = self.body(x)
        return self.norm(self.drop(x)) + torch.tanh(y.abs().sum() if y.is_complex() else y.sum())


@settings(max_examples=max(20, settings.default.max_examples // 5))
@given(
    schedule=st.sampled_from(SCHEDULES),
    microbatches=st.integers(1, 4),
    compile=st.sampled_from([False, {"backend": "aten"}]),
    doing=DOING.map(lambda some: [*TRAINING[:6], *some, *TRAINING[:6], *some]),
    bodies=st.lists(
        strategies.modules(dtype=torch.float64, blocks=("residual", "tied", "repeat")), min_size=1, max_size=3
    ),
)
def test_any_captured_schedule_is_that_schedule(
    schedule: str, microbatches: int, compile: Any, doing: list[str], bodies: list[nn.Module]
) -> None:
    num_stages = 1 if schedule in ONE_STAGE_A_RANK else 2 if schedule in V_SHAPED else 3
    assume(schedule != "DualPipeV" or microbatches > 1)

    def model(num_stages: int, batch: int) -> Model:
        torch.manual_seed(0)
        modules: list[nn.Module] = [
            Residual(copy.deepcopy(bodies[i % len(bodies)])).double() for i in range(num_stages)
        ]
        x, y = (torch.randn(batch, 3, dtype=torch.float64) for _ in range(2))
        return Model(modules, (x,), y)

    case = Case(schedule, num_stages, microbatches, model, compile=compile, folded=True)
    with one_process() as group:
        try:
            Run(case, group, capture=False).do("step", 0)
        except (fs.StageError, RuntimeError):
            assume(False)  # a stage whose shapes depend on values, or that writes into what it is given
        assert_same(case, group, doing)


@settings(max_examples=max(20, settings.default.max_examples // 5))
@given(
    schedule=st.sampled_from(SCHEDULES),
    microbatches=st.integers(1, 4),
    compile=st.sampled_from([False, {"backend": "aten"}]),
    doing=st.lists(st.sampled_from(["step", "step", "step", "toggle", "half", "in place", "close"])),
    bodies=st.lists(
        strategies.modules(dtype=torch.float64, blocks=("residual", "tied", "repeat")), min_size=1, max_size=3
    ),
)
def test_any_captured_pipeline_in_one_process_is_that_pipeline(
    schedule: Any, microbatches: int, compile: Any, doing: list[str], bodies: list[nn.Module]
) -> None:
    num_stages = 1 if schedule in ONE_STAGE_A_RANK else 2 if schedule in V_SHAPED else 3
    assume(schedule != "DualPipeV" or microbatches > 1)

    def seen(capture: bool) -> list[Any]:
        torch.manual_seed(0)
        modules = [Residual(copy.deepcopy(bodies[i % len(bodies)])).double() for i in range(num_stages)]
        stages = [fs.functionalize(module) for module in modules]
        if compile:
            stages = [stage._replace(apply=fs.compile(stage.apply, **compile)) for stage in stages]
        step = pipeline_value_and_grad(
            stages, mse_loss, schedule=schedule, num_microbatches=microbatches, captured=capture
        )
        if capture:
            on_host(step)
        params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
        rows, found = 4 * microbatches, []
        for number, what in enumerate(["step"] * 4 + doing + ["step"] * 4):
            if what == "toggle":
                modules[0].train(not modules[0].training)
            elif what == "half":
                rows = 6 * microbatches - rows
            elif what == "in place":
                params[0]["norm.weight"].mul_(2)
            elif what == "close" and capture:
                step.close()
            torch.manual_seed(number)
            x, y = (torch.randn(rows, 3, dtype=torch.float64) for _ in range(2))
            loss, buffers, grads = step(params, buffers, x, y)
            params = [
                {name: p if g[name] is None else p - 0.01 * g[name] for name, p in of.items()}
                for of, g in zip(params, grads, strict=True)
            ]
            found.append((loss, buffers, grads, params))
        return found

    try:
        expected = seen(False)
    except (fs.StageError, RuntimeError):
        assume(False)  # a stage whose shapes depend on values, or that writes into what it is given
    torch.testing.assert_close(seen(True), expected, rtol=0, atol=0, equal_nan=True)
