"""Scalars of steps: right by another count, in real event files, and nothing where nobody asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, captured, logged, pipeline_value_and_grad
from funcstage.pipelining.ranges import HERE

mse = nn.functional.mse_loss
Scalars = dict[str, float]


class Slow(torch.autograd.Function):
    """Sleeps in F for so long, and for ten times as long in the backward of its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return grad.clone()


class Sleeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(Slow.apply(x)).tanh()


def pipeline(schedule: str = "ZBVZeroBubble", layer: Any = lambda: nn.Linear(16, 16), **options: Any) -> Any:
    stages = [fs.functionalize(layer()) for _ in range(4)]
    step = pipeline_value_and_grad(stages, mse, schedule=schedule, num_microbatches=4, **options)
    return step, [s.params for s in stages], [s.buffers for s in stages]


def test_a_logged_step_returns_what_the_step_returns_and_its_loss() -> None:
    step, params, buffers = pipeline()
    x, y = torch.randn(2, 8, 16)
    told: list[tuple[int, Scalars]] = []
    loss, _, grads = logged(step, lambda *given: told.append(given))(params, buffers, x, y)
    value = x
    leaves = [{n: p.clone().requires_grad_() for n, p in stage.items()} for stage in params]
    for stage in leaves:
        value = nn.functional.linear(value, stage["weight"], stage["bias"])
    expected = mse(value, y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads, [{n: p.grad for n, p in stage.items()} for stage in leaves])
    [(number, scalars)] = told
    assert number == 0
    assert scalars["loss"] == pytest.approx(expected.item())


def test_seconds_are_those_of_f_i_and_w_and_a_slow_backward_shows_where_it_is() -> None:
    told: list[Scalars] = []
    step, params, buffers = pipeline(layer=Sleeping)
    x = torch.randn(8, 16)
    logged(step, lambda _, scalars: told.append(scalars))(params, buffers, x, x)
    [scalars] = told
    assert {name for name in scalars if name.endswith("stage_2")} == {
        *(f"{kind}_seconds/stage_2" for kind in "FIW"),
        "residual_bytes/stage_2",
    }
    assert scalars["F_seconds/stage_2"] >= 0.002
    assert scalars["I_seconds/stage_2"] >= 0.02  # the sleep is on the way to the input
    assert scalars["seconds"] >= 4 * sum(v for name, v in scalars.items() if "_seconds/" in name) * 0.99
    assert 0 <= scalars["bubble"] < 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "ZBVZeroBubble"])
def test_residual_bytes_are_the_most_that_pullbacks_hold(schedule: str, compile: bool) -> None:
    """Counted by hand: a stage holds its input for W, tanh's output for I, and a cotangent between I and W.

    At most, that is of two microbatches after F, one of which has gone through I where W waits: on the first
    stage I does nothing, so both tensors and the cotangent wait for W.
    """

    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    stages = [fs.functionalize(layer()) for _ in range(2)]
    if compile:
        stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    step = pipeline_value_and_grad(stages, mse, schedule=schedule, num_microbatches=2)
    x = torch.randn(8, 16)
    told: list[Scalars] = []
    run = logged(step, lambda _, scalars: told.append(scalars))
    run([s.params for s in stages], [s.buffers for s in stages], x, x)
    microbatch = 4 * 16 * 4
    most = (5 if schedule == "ZBVZeroBubble" else 4) * microbatch
    assert told[0]["residual_bytes/stage_0"] == most
    assert told[0]["residual_bytes"] <= 2 * most


@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
def test_a_schedule_of_torch_logs_as_a_step_in_one_process_does(compile: Any) -> None:
    torch.manual_seed(0)
    told: list[tuple[int, Scalars]] = []
    x, y = torch.randn(2, 8, 16)
    with one_process():
        stages = [
            FunctionalPipelineStage(nn.Linear(16, 16), i, 2, "cpu", compile=compile, loss_fn=mse)
            for i in range(2)
        ]
        schedule = ScheduleZBVZeroBubble(stages, 2, loss_fn=stages[-1].loss_fn)
        step = logged(schedule, lambda *given: told.append(given))
        given: list[torch.Tensor] = []
        output = step(x, target=y, losses=given)
        step(x, target=y)
        expected = stages[1].submod(stages[0].submod(x))
    torch.testing.assert_close(output, expected)
    assert [number for number, _ in told] == [0, 1]
    for _, scalars in told:
        assert scalars["loss"] == pytest.approx(mse(expected, y).item(), rel=1e-5)
        assert {name for name in scalars if "/" in name} == {
            f"{what}/stage_{s}"
            for s in range(2)
            for what in ("F_seconds", "I_seconds", "W_seconds", "residual_bytes")
        }
        busy = 2 * sum(v for name, v in scalars.items() if "_seconds/" in name)
        assert scalars["bubble"] == pytest.approx(1 - busy / scalars["seconds"])
    assert torch.stack(given).mean().item() == pytest.approx(told[0][1]["loss"])


def test_a_schedule_that_runs_i_and_w_as_one_has_seconds_of_b() -> None:
    told: list[Scalars] = []
    x = torch.randn(8, 16)
    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(16, 16), 0, 1, "cpu")
        logged(Schedule1F1B(stage, 2, loss_fn=mse), lambda _, scalars: told.append(scalars))(x, target=x)
    assert {name for name in told[0] if "/" in name} == {
        "F_seconds/stage_0",
        "B_seconds/stage_0",
        "residual_bytes/stage_0",
    }


@pytest.mark.filterwarnings("ignore:.*cannot be captured")
def test_a_captured_step_has_loss_and_seconds() -> None:
    told: list[Scalars] = []
    x = torch.randn(8, 16)
    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(16, 16), 0, 1, "cpu")
        schedule = captured(Schedule1F1B(stage, 2, loss_fn=mse))
        logged(schedule, lambda _, scalars: told.append(scalars))(x, target=x)
        assert told[0]["loss"] == pytest.approx(mse(stage.submod(x), x).item(), rel=1e-5)
    assert set(told[0]) == {"loss", "seconds"}


def test_only_one_step_of_so_many_is_measured() -> None:
    told: list[int] = []
    step, params, buffers = pipeline("1F1B")
    run = logged(step, lambda number, _: told.append(number), every=3)
    x = torch.randn(8, 16)
    for _ in range(7):
        run(params, buffers, x, x)
    assert told == [0, 3, 6]


def test_a_step_that_fails_logs_nothing_and_is_not_measured_any_more() -> None:
    told: list[int] = []
    step, params, buffers = pipeline("1F1B")
    run = logged(step, lambda number, _: told.append(number))
    x = torch.randn(8, 16)
    with pytest.raises(RuntimeError, match="shapes"):
        run(params, buffers, torch.randn(8, 3), x)
    assert HERE.meter is None
    run(params, buffers, x, x)
    assert told == [1]


def test_what_cannot_be_logged_is_refused_with_a_way_out() -> None:
    step, *_ = pipeline("1F1B")
    with pytest.raises(fs.StageError, match="log must be a function"):
        logged(step, None)  # type: ignore[arg-type]
    with pytest.raises(fs.StageError, match="every must be a whole number"):
        logged(step, print, every=0)
    with pytest.raises(fs.StageError, match="Pass the schedule itself"):
        logged(print, print)
    with one_process():
        theirs = PipelineStage(nn.Linear(3, 3), 0, 1, torch.device("cpu"))
        with pytest.raises(fs.StageError, match="Make it a FunctionalPipelineStage"):
            logged(Schedule1F1B(theirs, 2, loss_fn=mse), print)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    told: list[Scalars] = []
    step, params, buffers = pipeline()
    x = torch.randn(8, 16)
    with SummaryWriter(tmp_path) as writer:

        def log(number: int, scalars: Scalars) -> None:
            told.append(scalars)
            for name, value in scalars.items():
                writer.add_scalar(name, value, number)

        run = logged(step, log)
        for _ in range(3):
            run(params, buffers, x, x)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(told[0])
    for name in told[0]:
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(i, pytest.approx(scalars[name])) for i, scalars in enumerate(told)]
