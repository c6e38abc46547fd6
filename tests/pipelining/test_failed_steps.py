"""Steps that fail in their midst: what is left, what is said of it, and the step after that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupting import FAIL, Brittle, calls_of, interrupted, state_of_everything
from one_process import one_process
from pipeline_ranks import Raised, ranks
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, failed_steps, pipeline_value_and_grad

pytestmark = pytest.mark.timeout(600)

ATEN = {"backend": "aten"}
ENGINES = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
MICROBATCHES = 4


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_process():
        yield


class Part(nn.Module):
    """Fails in the n-th F if told so, and in I or W where a `Brittle` does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if ARMED.get("F"):
            count_down("F")
        x = Brittle.apply(x.sin()) + 0
        return functional.linear(self.norm(self.a(x)).tanh(), Brittle.apply(self.b.weight), self.b.bias)


ARMED: dict[str, list[Any]] = {}


def count_down(place: str) -> None:
    armed = ARMED[place]
    armed[0] -= 1
    if armed[0] == 0:
        del ARMED[place]
        raise armed[1]


class Batch:
    """A pipeline of this process, and a batch for it."""

    def __init__(self, schedule: str, compile: Any, *, folded: bool = False, kind: Any = Part) -> None:
        torch.manual_seed(0)
        one = schedule in ("GPipe", "1F1B")
        self.modules = [kind() for _ in range(1 if one else 2)]
        self.whole = copy.deepcopy(nn.Sequential(*self.modules))
        self.x, self.target = torch.randn(8, 3), torch.randn(8, 3)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            if ARMED.get("loss"):
                count_down("loss")
            return functional.mse_loss(output, target)

        self.stages = [
            FunctionalPipelineStage(m, i, len(self.modules), "cpu", compile=compile, loss_fn=loss)
            for i, m in enumerate(self.modules)
        ]
        loss_fn = self.stages[-1].loss_fn if folded else loss
        given = self.stages[0] if one else self.stages
        self.schedule = schedules.get_schedule_class(schedule)(given, MICROBATCHES, loss_fn=loss_fn)

    def step(self, x: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        losses: list[Tensor] = []
        output = self.schedule.step(self.x if x is None else x, target=self.target, losses=losses)
        return output, [loss.detach() for loss in losses]

    def assert_right_step(self) -> None:
        """Run a step from clean gradients and buffers, and compare with the whole model by autograd."""
        for module in (*self.modules, *self.whole):
            module.zero_grad()
            module.norm.reset_running_stats()
        parts = list(zip(self.x.chunk(MICROBATCHES), self.target.chunk(MICROBATCHES), strict=True))
        outputs = [self.whole(x) for x, _ in parts]
        losses = [functional.mse_loss(y, t) for y, (_, t) in zip(outputs, parts, strict=True)]
        torch.stack(losses).mean().backward()
        output, found = self.step()
        torch.testing.assert_close(output, torch.cat(outputs).detach())
        torch.testing.assert_close(found, [loss.detach() for loss in losses])
        now = nn.Sequential(*self.modules)
        for get in (lambda m: [p.grad for p in m.parameters()], lambda m: list(m.buffers())):
            torch.testing.assert_close(get(now), get(self.whole))


def alike(grad: Tensor | None, wanted: Tensor | None) -> bool:
    return (grad is None) == (wanted is None) and (grad is None or torch.allclose(grad, wanted, atol=1e-6))


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    ("place", "compile"), [("F", False), ("loss", False), ("loss", ATEN)]
)  # a compiled stage does not run its forward again
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_step_after_one_that_failed_in_f_or_a_loss_is_right(
    schedule: str, place: str, n: int, compile: Any
) -> None:
    batch = Batch(schedule, compile)
    batch.assert_right_step()
    ARMED[place] = [n, KeyError("of the user")]
    with pytest.raises(KeyError, match="of the user"):
        batch.step(batch.x * 3)
    batch.assert_right_step()


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("n", range(0, 16, 3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_error_in_i_or_w_says_which_microbatches_are_in_and_the_next_step_is_right(
    schedule: str, n: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(schedule, False)
    batch.assert_right_step()
    nn.Sequential(*batch.modules).zero_grad()
    own = Brittle.backward
    runs = 0

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == n + 1:
            FAIL.append(kind())
        return own(ctx, grad)

    before = state_of_everything(nn.ModuleList(batch.modules))
    with monkeypatch.context() as patch:
        patch.setattr(Brittle, "backward", staticmethod(backward))
        try:
            batch.step()
        except kind as caught:
            notes = "\n".join(getattr(caught, "__notes__", ()))  # none where nothing was added
        else:
            assert runs <= n  # no more of them in this pipeline
            return
    assert state_of_everything(nn.ModuleList(batch.modules)) == before
    for i, module in enumerate(batch.modules):
        touched = any(p.grad is not None for p in module.parameters())
        assert (
            f"stage {i} of {len(batch.modules)} (Part): `.grad` has the gradients" in notes
        ) or not touched
    batch.assert_right_step()


@ENGINES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_note_is_true_of_the_gradients(schedule: str, compile: Any) -> None:
    batch = Batch(schedule, compile)
    batch.step()
    nn.Sequential(*batch.modules).zero_grad()
    stage: Any = batch.stages[0]
    own = stage._accumulate_directly

    def failing(weight_pullback: Any) -> None:
        if len(stage._progress.added) == 2:
            raise MemoryError("full")
        own(weight_pullback)

    stage._accumulate_directly = failing
    with pytest.raises(MemoryError) as caught:
        batch.step()
    note = caught.value.__notes__[-1]
    assert f"stage 0 of {len(batch.modules)} (Part): `.grad` has the gradients of microbatch(es)" in note
    added = stage._progress.added
    assert len(added) == 2
    for module in batch.whole:
        module.zero_grad()
        module.norm.reset_running_stats()
    for i in added:
        loss = functional.mse_loss(
            batch.whole(batch.x.chunk(MICROBATCHES)[i]), batch.target.chunk(MICROBATCHES)[i]
        )
        loss.backward()
    for mine, wanted in zip(batch.modules[0].parameters(), batch.whole[0].parameters(), strict=True):
        assert alike(mine.grad, wanted.grad)
    del stage._accumulate_directly
    batch.assert_right_step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hook_that_fails_leaves_a_stage_that_works(schedule: str) -> None:
    batch = Batch(schedule, False)
    calls = 0

    def hook(grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("hook")

    handle = batch.modules[-1].a.weight.register_hook(hook)
    with pytest.raises(KeyError, match="hook") as caught:
        batch.step()
    assert "in part" in caught.value.__notes__[-1]
    handle.remove()
    batch.assert_right_step()


def test_nothing_that_torchs_schedules_keep_of_a_step_is_left() -> None:
    batch = Batch("ZBVZeroBubble", False)
    found = [name for name in failed_steps.KEPT_BY_SCHEDULES if hasattr(batch.schedule, name)]
    assert found == list(failed_steps.KEPT_BY_SCHEDULES)
    ARMED["loss"] = [3, KeyError()]
    with pytest.raises(KeyError):
        batch.step()
    failed_steps.forget(batch.schedule)
    assert not any(getattr(batch.schedule, name) for name in found)


# Interrupts.


class Square(nn.Module):
    """What the engine enters other modes and levels for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False)
        return self.b(self.norm(y))


@pytest.fixture(scope="module")
def batches() -> dict[Any, Batch]:
    return {}


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schedule=st.sampled_from(SCHEDULES),
    compiled=st.booleans(),
    folded=st.booleans(),
    fresh=st.booleans(),
    share=st.floats(0, 1),
)
def test_a_step_interrupted_anywhere_leaves_nothing_behind(
    batches: dict[Any, Batch], schedule: str, compiled: bool, folded: bool, fresh: bool, share: float
) -> None:
    fresh = fresh and not compiled  # which takes seconds
    key = schedule, compiled, folded
    if fresh or key not in batches:
        batches[key] = Batch(schedule, ATEN if compiled else False, folded=folded, kind=Square)
    batch = batches[key]
    before = state_of_everything(nn.ModuleList(batch.modules))
    interrupted(batch.step, 1 + int(share * calls_of(batch.step)))
    assert state_of_everything(nn.ModuleList(batch.modules)) == before
    batch.assert_right_step()


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.sampled_from(["GPipe", "Interleaved1F1B", "ZBVZeroBubble"]), share=st.floats(0, 1))
def test_a_local_pipeline_interrupted_anywhere_leaves_nothing_behind(schedule: str, share: float) -> None:
    torch.manual_seed(0)
    modules = [Square() for _ in range(2)]
    stages = [fs.functionalize(module) for module in modules]
    step = pipeline_value_and_grad(stages, functional.mse_loss, schedule=schedule, num_microbatches=4)
    x, target = torch.randn(8, 3), torch.randn(8, 3)

    def run() -> Any:
        return step([s.params for s in stages], [s.buffers for s in stages], x, target)

    before = state_of_everything(nn.ModuleList(modules))
    interrupted(run, 1 + int(share * calls_of(run)))
    assert state_of_everything(nn.ModuleList(modules)) == before
    loss, _, grads = run()
    parts = zip(x.chunk(4), target.chunk(4), strict=True)
    wanted = torch.stack([functional.mse_loss(nn.Sequential(*modules)(a), b) for a, b in parts]).mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    for found, module in zip(grads, modules, strict=True):
        torch.testing.assert_close(found, {name: p.grad for name, p in module.named_parameters()})


# Two processes.


class Stops(nn.Linear):
    """Is interrupted in its third forward with real tensors."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return super().forward(x)


def interrupted_rank(rank: int, group: dist.ProcessGroup, at: int) -> list[str]:
    said = []
    torch.manual_seed(0)
    modules = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for attempt in range(2):
        mine = Stops(4, 4) if rank == at and not attempt else modules[rank]
        stage = FunctionalPipelineStage(mine, rank, 2, "cpu", group=group)
        schedule = schedules.Schedule1F1B(stage, 4, loss_fn=functional.mse_loss)
        x, target = torch.ones(8, 4), torch.zeros(8, 4)
        args = (x,) if rank == 0 else ()
        if attempt:
            modules[rank].zero_grad()
            schedule.step(*args, target=target)
            functional.mse_loss(nn.Sequential(*modules)(x), target).backward()
            whole = [p.grad for p in modules[rank].parameters()]
            modules[rank].zero_grad()
            schedule.step(*args, target=target)
            torch.testing.assert_close([p.grad * 2 for p in modules[rank].parameters()], whole)
            continue
        for _ in range(2):
            try:
                schedule.step(*args, target=target)
            except (Exception, KeyboardInterrupt) as error:
                said.append(f"{type(error).__name__}: {error}")
        group = dist.new_group()
    return said


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_is_interrupted_stops_the_others_and_the_group_is_refused(at: int) -> None:
    answers = ranks(2).run(interrupted_rank, at)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, Raised), answer
        first, second = answer
        assert "KeyboardInterrupt" in first
        assert first.startswith("KeyboardInterrupt") == (rank == at)
        assert "A step has failed in this process group" in second
        assert f"Stage {at} of 2 has failed: KeyboardInterrupt" in second
        assert "make a new process group" in second
