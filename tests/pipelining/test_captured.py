"""Captured schedules without a CUDA device: recorded on the CPU, or running as they are."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import recorded_on_host
import torch
from captured_runs import TRAINING, assert_same, recorded
from one_process import one_process
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    V_SHAPED,
    Case,
    growing,
    uneven,
    with_everything,
)
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage, captured
from funcstage.pipelining.capture.entries import MAX_GRAPHS
from funcstage.pipelining.capture.rehearsal import rehearse
from funcstage.pipelining.capture.watchdog import Watchdog

ATEN = {"backend": "aten"}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    with one_process() as group:
        yield group


def one_stage(module: nn.Module, loss_fn: Any = functional.mse_loss, ours: bool = True) -> Any:
    if not ours:
        return ScheduleGPipe(PipelineStage(module, 0, 1, torch.device("cpu")), 2, loss_fn=loss_fn)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", loss_fn=loss_fn)
    return ScheduleGPipe(stage, 2, loss_fn=stage.loss_fn)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def stages_for(schedule: str) -> int:
    return 1 if schedule in ONE_STAGE_A_RANK else 2 if schedule in V_SHAPED else 3


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_is_the_same_to_the_last_bit(schedule: str, compile: Any, group: Any) -> None:
    case = Case(schedule, stages_for(schedule), 4, compile=compile, folded=True)
    assert assert_same(case, group, TRAINING).replays == 3


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B"])
def test_each_length_has_a_graph(schedule: str, group: Any) -> None:
    case = Case(schedule, stages_for(schedule), 4, uneven, compile=ATEN)
    doing = ["step", "clear", "longer", "clear"] * 5 + ["eval", "longer", "clear"] * 3
    recorder = assert_same(case, group, doing)
    assert recorder.replays >= 4


def test_an_order_from_a_file_is_captured(group: Any) -> None:
    order = ("0F0 1F0 1I0 0I0 0F1 1F1 1I1 1W0 0I1 0W0 1W1 0W1",)
    assert assert_same(Case(order, 2, 2, folded=True), group, TRAINING).replays == 3


@pytest.mark.parametrize("model", [with_everything, growing])
def test_buffers_ties_and_parameters_without_gradients_are_eagers(model: Any, group: Any) -> None:
    case = Case("InterleavedZeroBubble", 3, 4, model, size=3, folded=True)
    assert assert_same(case, group, TRAINING).replays == 3


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_stages_of_torchs_own_are_captured(schedule: str, group: Any) -> None:
    case = Case(schedule, stages_for(schedule), 4, torchs=(0, 1, 2))
    assert assert_same(case, group, TRAINING).replays == 3


def test_a_step_that_fails_between_replays_leaves_them_as_they_are(group: Any) -> None:
    case = Case("ZBVZeroBubble", 2, 4, folded=True)
    assert_same(case, group, [*TRAINING, "fail", "clear", *TRAINING])


@pytest.mark.parametrize("ours", [True, False])
def test_after_a_rehearsal_the_first_step_is_the_same(ours: bool) -> None:
    def first_step(rehearsed: bool) -> Any:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
        schedule = one_stage(module, ours=ours)
        x, y = batch()
        torch.manual_seed(1)
        if rehearsed:
            rehearse([schedule._stage], [*module.parameters()], lambda: schedule.step(x, target=y))
            assert all(p.grad is None for p in module.parameters())
        output = schedule.step(x, target=y)
        return output.detach(), [p.grad for p in module.parameters()], module.state_dict()

    torch.testing.assert_close(first_step(True), first_step(False), rtol=0, atol=0)


def test_dropout_is_drawn_anew_in_each_replay() -> None:
    schedule, recorder = recorded(one_stage(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()))
    x, y = batch()
    outputs = [schedule.step(x, target=y) for _ in range(6)]
    assert recorder.replays >= 2
    assert not torch.equal(outputs[-1], outputs[-2])


@pytest.mark.parametrize("ours", [True, False])
def test_a_stage_that_waits_for_a_value_is_named_with_its_line(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        vars(recorded_on_host), "__name__", "torch.recorded_on_host"
    )  # whose lines are not named

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y if x.device.type == "meta" or y.sum().item() < 9 else y * 2

    torch.manual_seed(0)
    module = Waiting().double()
    stage: Any = PipelineStage(module, 0, 1, torch.device("cpu"))
    if ours:
        example = torch.empty(3, 4, dtype=torch.float64)
        stage = FunctionalPipelineStage(module, 0, 1, "cpu", output_args=example)
    schedule, recorder = recorded(ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss))
    x, y = batch()
    for _ in range(2):
        schedule.step(x, target=y)
        grads = [p.grad for p in module.parameters()]
        module.zero_grad()
    line = Waiting.forward.__code__.co_firstlineno + 2
    with pytest.warns(
        UserWarning, match=rf"stage 0 of 1 \(Waiting\) cannot be captured, at .*py:{line}: operation"
    ):
        schedule.step(x, target=y)
    assert "not captured: stage 0" in repr(schedule)
    assert recorder.replays == 0
    torch.testing.assert_close([p.grad for p in module.parameters()], grads, rtol=0, atol=0)


# What a graph has baked in.


def change_attribute(module: Any) -> None:
    module[1].p = 0.25


def add_hook(module: Any) -> None:
    module[0].register_forward_hook(lambda module, args, output: output * 2)


def add_parameter_hook(module: Any) -> None:
    module[0].weight.register_hook(lambda grad: grad * 2)


def freeze(module: Any) -> None:
    module[0].weight.requires_grad_(False)


def move(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.clone() + 1


def replace_parameter(module: Any) -> None:
    module[2].weight = nn.Parameter(module[2].weight.detach() + 1)


def replace_module(module: Any) -> None:
    module[1] = nn.Tanh()


def evaluate(module: Any) -> None:
    module.eval()


CHANGES = [
    change_attribute,
    add_hook,
    add_parameter_hook,
    freeze,
    move,
    replace_parameter,
    replace_module,
    evaluate,
]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_a_graph_cannot_know_of_is_taken_up(change: Callable[[Any], None], ours: bool) -> None:
    def outputs(capture: bool) -> tuple[list[Any], Any]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).double()
        schedule = one_stage(module, ours=ours)
        recorder = None
        if capture:
            schedule, recorder = recorded(schedule)
        x, y = batch()
        seen = []
        for i in range(12):
            if i == 6:
                change(module)
            torch.manual_seed(i)
            seen.append(schedule.step(x, target=y).detach())
            seen += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            module.zero_grad()
        return seen, recorder

    found, recorder = outputs(True)
    torch.testing.assert_close(found, outputs(False)[0], rtol=0, atol=0)
    assert len(recorder.recordings) == 2  # before and after
    assert recorder.replays >= 7


def test_another_module_assigned_to_a_stage_is_taken_up() -> None:
    module, other = linear(), linear()
    schedule = one_stage(module)
    made, _ = recorded(schedule)
    x, y = batch()
    for _ in range(5):
        before = made.step(x, target=y)
    with torch.no_grad():
        other[0].weight.mul_(2)
    schedule._stage.submod = other
    expected = torch.cat([other(part) for part in x.chunk(2)]).detach()
    torch.testing.assert_close(made.step(x, target=y), expected, rtol=0, atol=0)
    assert not torch.equal(made.step(x, target=y), before)


def test_an_attribute_that_each_step_changes_is_named() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    def outputs(schedule: Any) -> list[Tensor]:
        x, y = batch()
        return [schedule.step(x, target=y).detach() for _ in range(6)]

    torch.manual_seed(0)
    schedule, recorder = recorded(one_stage(Counting().double(), ours=False))
    with pytest.warns(UserWarning, match=r"stage 0 \(Counting\)\.calls was \d+ and is \d+ by each step"):
        found = outputs(schedule)
    assert recorder.replays == 0
    torch.manual_seed(0)
    torch.testing.assert_close(found, outputs(one_stage(Counting().double(), ours=False)), rtol=0, atol=0)


def test_a_learning_rate_that_is_a_number_and_changes_is_named_and_right() -> None:
    def weights(capture: bool) -> Any:
        module = linear()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        schedule = recorded(one_stage(module), optimizer)[0] if capture else one_stage(module)
        x, y = batch()
        for _ in range(8):
            schedule.step(x, target=y)
            if not capture:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return [p.detach() for p in module.parameters()]

    with pytest.warns(UserWarning, match=r"param_groups\[0\]\.lr was .* before each of the last 3 steps"):
        found = weights(True)
    torch.testing.assert_close(found, weights(False), rtol=0, atol=0)


def test_optimizer_state_that_is_loaded_is_taken_up() -> None:
    def weights(capture: bool) -> Any:
        module = linear()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        schedule = recorded(one_stage(module), optimizer)[0] if capture else one_stage(module)
        x, y = batch()
        for i in range(10):
            if i == 3:
                saved = optimizer.state_dict()
                saved = {
                    **saved,
                    "state": {k: {n: t.clone() for n, t in v.items()} for k, v in saved["state"].items()},
                }
            if i == 6:
                optimizer.load_state_dict(saved)
            schedule.step(x, target=y)
            if not capture:
                optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in module.parameters()]

    torch.testing.assert_close(weights(True), weights(False), rtol=0, atol=0)


def test_a_tensor_that_the_loss_has_from_around_it_may_be_another_one() -> None:
    weight = torch.ones((), dtype=torch.float64)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output, target) * weight

    schedule, recorder = recorded(one_stage(linear(), loss_fn))
    x, y = batch()
    losses: list[Tensor] = []
    for _ in range(5):
        schedule.step(x, target=y, losses=losses)
    assert recorder.replays
    before = losses[0]
    weight = torch.full((), 3.0, dtype=torch.float64)
    schedule.step(x, target=y, losses=losses)
    torch.testing.assert_close(losses[0], 3 * before)


FACTOR = 2.0


def test_a_global_that_a_stage_reads_may_be_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def scaled(self, x: Tensor) -> Tensor:
            return x * FACTOR

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(self.linear(x))

    module = Scaled().double()
    schedule, recorder = recorded(one_stage(module, ours=False))
    x, y = batch()
    for factor in (2.0, 3.0, 2.0):
        monkeypatch.setattr(f"{__name__}.FACTOR", factor)
        for _ in range(4):
            output = schedule.step(x, target=y)
            module.zero_grad()
            torch.testing.assert_close(output.detach(), module(x).detach(), rtol=1e-14, atol=0)
    assert len(recorder.recordings) == 2


# Results and gradients are the caller's.


def test_losses_and_outputs_are_not_overwritten_by_the_next_replay() -> None:
    schedule, recorder = recorded(one_stage(linear()))
    kept: list[Any] = []
    for seed in range(6):
        losses: list[Tensor] = []
        x, y = batch(seed)
        output = schedule.step(x, target=y, losses=losses)
        kept.append((output, losses, [output.clone(), *(loss.clone() for loss in losses)]))
    assert recorder.replays >= 2
    for output, losses, copies in kept:
        torch.testing.assert_close([output, *losses], copies, rtol=0, atol=0)


@pytest.mark.parametrize("hold", ["tensors", "views"])
def test_gradients_that_somebody_holds_keep_their_values(hold: str) -> None:
    module = linear()
    schedule, recorder = recorded(one_stage(module))
    held: list[Any] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(8):
            x, y = batch(seed)
            schedule.step(x, target=y)
            grads = [p.grad for p in module.parameters()]
            held.append(([g if hold == "tensors" else g.view(-1) for g in grads], [g.clone() for g in grads]))
            del grads
            module.zero_grad()
    for grads, copies in held:
        torch.testing.assert_close(
            [g.view_as(c) for g, c in zip(grads, copies, strict=True)], copies, rtol=0, atol=0
        )
    assert recorder.replays >= (5 if hold == "tensors" else 1)
    assert any("views of gradients" in str(each.message) for each in said) == (hold == "views")


def test_a_gradient_is_the_same_tensor_as_long_as_it_is_added_to() -> None:
    module = linear()
    schedule, recorder = recorded(one_stage(module))
    x, y = batch()
    for _ in range(3):
        schedule.step(x, target=y)
        module.zero_grad()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    mine = [p.grad for p in module.parameters()]
    for _ in range(5):
        schedule.step(x, target=y)
    assert recorder.replays >= 2
    assert all(p.grad is grad for p, grad in zip(module.parameters(), mine, strict=True))


# Signatures.


def test_each_number_among_the_arguments_has_a_graph_up_to_a_bound() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.linear(x) * scale

    module = Scaled().double()
    schedule, recorder = recorded(one_stage(module))
    x, y = batch()
    scales = [float(i) for i in range(MAX_GRAPHS + 2)] * 5
    random.Random(0).shuffle(scales)

    def steps() -> None:
        for scale in scales:
            output = schedule.step(x, target=y, scale=scale)
            torch.testing.assert_close(output, (module.linear(x) * scale).detach())
            module.zero_grad()

    with pytest.warns(UserWarning, match=f"there are {MAX_GRAPHS} graphs already"):
        steps()
    assert len(recorder.recordings) == MAX_GRAPHS


def test_graphs_that_no_longer_hold_make_room_for_others() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()
    schedule, recorder = recorded(one_stage(module))
    x, y = batch()
    for i in range(MAX_GRAPHS + 3):
        module[1].p = i / 100
        for _ in range(4):
            schedule.step(x, target=y)
            module.zero_grad()
    assert len(recorder.recordings) == MAX_GRAPHS + 3
    assert len(schedule._entries) <= MAX_GRAPHS


def test_an_argument_that_requires_grad_lets_the_step_run_as_it_is() -> None:
    schedule, recorder = recorded(one_stage(linear()))
    x, y = batch()
    x.requires_grad_()
    with pytest.warns(UserWarning, match=r"\(args, kwargs\)\[0\]\[0\] is a tensor that requires grad"):
        _ = [schedule.step(x, target=y) for _ in range(4)]
    assert x.grad is not None
    assert recorder.replays == 0


def test_a_step_that_writes_into_its_argument_runs_as_it_is() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.clone())
            x.add_(1)
            return y

    schedule, recorder = recorded(one_stage(Writing().double(), ours=False))
    x, y = batch()
    eager = x.clone()
    with pytest.warns(UserWarning, match="writes into its arguments"):
        _ = [schedule.step(x, target=y) for _ in range(5)]
    assert recorder.replays == 0
    plain = one_stage(Writing().double(), ours=False)
    for _ in range(5):
        plain.step(eager, target=y)
    torch.testing.assert_close(x, eager, rtol=0, atol=0)


# As it is.


def test_on_the_cpu_it_says_so_once_and_runs_the_schedule() -> None:
    module, other = linear(), linear()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, other))
    with pytest.warns(UserWarning, match=r"ScheduleGPipe runs as it is.*stages on cpu.*Move the stages"):
        schedule = captured(one_stage(module), optimizer=optimizer)
    expected = one_stage(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            x, y = batch(seed)
            losses: list[Tensor] = ["of before"]  # type: ignore[list-item]
            wanted: list[Tensor] = []
            output = schedule.step(x, target=y, losses=losses)
            torch.testing.assert_close(output, expected.step(x, target=y, losses=wanted), rtol=0, atol=0)
            plain.step()
            torch.testing.assert_close(losses, wanted, rtol=0, atol=0)
            torch.testing.assert_close(schedule.eval(x, target=y), expected.eval(x, target=y), rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert "not captured: stages on cpu" in repr(schedule)


def test_what_is_no_schedule_or_no_optimizer_is_refused() -> None:
    with pytest.raises(
        fs.StageError, match=r"takes a schedule of torch\.distributed\.pipelining, got Linear"
    ):
        captured(nn.Linear(2, 2))
    with pytest.raises(fs.StageError, match=r"optimizer must be a torch\.optim\.Optimizer, got function"):
        captured(one_stage(linear()), optimizer=lambda: None)  # type: ignore[arg-type]


def test_closing_drops_the_graphs_and_later_steps_make_new_ones() -> None:
    module = linear()
    schedule, recorder = recorded(one_stage(module))
    x, y = batch()
    for _ in range(4):
        output = schedule.step(x, target=y)
    assert "graphs of" in repr(schedule)
    schedule.close()
    assert repr(schedule) == "<captured ScheduleGPipe, 0 graphs of 8>"
    for _ in range(4):
        torch.testing.assert_close(schedule.step(x, target=y), output, rtol=0, atol=0)
    assert len(recorder.recordings) >= 2


def test_graphs_are_gone_before_the_default_process_group_is() -> None:
    from funcstage._torch.distributed import before_shutdown

    class Closed:
        def __init__(self) -> None:
            self.closed = 0

        def close(self) -> None:
            self.closed += 1

    first, dead = Closed(), Closed()
    before_shutdown(dead.close)
    before_shutdown(first.close)
    del dead
    gc.collect()
    (closing,) = [c for c in torch.distributed.distributed_c10d._world.comms if hasattr(c, "waiting")]
    closing.finalize()
    torch.distributed.distributed_c10d._world.comms.remove(closing)
    assert first.closed == 1


class Event:
    def __init__(self, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


@pytest.mark.parametrize(("failed", "said"), [(None, "s for other ranks"), ("stage 1 has failed", "stage 1")])
def test_a_replay_that_does_not_end_ends_the_process(failed: str | None, said: str) -> None:
    ended: list[str] = []
    watchdog = Watchdog(0.1, lambda: failed, ended.append)
    watchdog.watch(Event(True))
    watchdog.watch(Event(False))
    assert watchdog._thread is not None
    watchdog._thread.join(30)
    assert len(ended) == 1
    assert said in ended[0]


def test_replays_that_end_are_not_noticed() -> None:
    ended: list[str] = []
    watchdog = Watchdog(0.05, lambda: None, ended.append)
    events = [Event(False) for _ in range(3)]
    for event in events:
        watchdog.watch(event)
        event.done = True
    assert watchdog._thread is not None
    watchdog._thread.join(0.3)
    assert not ended
    watchdog.close()
    watchdog._thread.join(30)
    assert not watchdog._thread.is_alive()
