"""Captured schedules on CUDA devices, to the last bit what the same schedules compute as they are."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional

from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage, captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ONE_STAGE_A_RANK = ("GPipe", "1F1B")
STEPS = 8


class Block(nn.Module):
    """A bit of everything that a replay has to get right: dropout, batch statistics, an unused parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(2 * width, width)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.norm(self.up(x)).relu()))


class Waiting(Block):
    """A block that waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum().item() > 1e9 else y


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """NCCL's, of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def stages_of(
    schedule: str, ours: bool, compile: Any, kind: type[Block] = Block, world: int = 1, rank: int = 0
) -> list[Any]:
    chunks = 1 if schedule in ONE_STAGE_A_RANK else 2
    n = world * chunks
    v_shaped = schedule in ("ZBVZeroBubble", "DualPipeV")
    mine = [rank, n - 1 - rank] if v_shaped else [*range(rank, n, world)]
    device = torch.device("cuda", rank)
    made = []
    for i in mine:
        torch.manual_seed(i)
        module = kind(16).to(device)
        if ours:
            made.append(
                FunctionalPipelineStage(
                    module,
                    i,
                    n,
                    device,
                    compile=compile,
                    loss_fn=functional.mse_loss,
                    output_args=torch.empty(2, 16, device=device),
                )
            )
        else:
            made.append(PipelineStage(module, i, n, device))
    return made


def schedule_of(name: str, stages: list[Any], microbatches: int = 4) -> Any:
    kind = schedules.get_schedule_class(name)
    one = issubclass(kind, schedules.PipelineScheduleSingle)
    loss_fn = getattr(stages[-1], "loss_fn", functional.mse_loss)
    return kind(stages[0] if one else stages, microbatches, loss_fn=loss_fn)


def optimizer_of(stages: list[Any]) -> torch.optim.Optimizer:
    """AdamW that clips gradients first, and whose learning rate is a tensor."""
    parameters = [p for stage in stages for p in stage.submod.parameters()]
    lr = torch.tensor(1e-2, device=parameters[0].device)
    made = torch.optim.AdamW(parameters, lr=lr, capturable=True)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    made.register_step_pre_hook(clip)
    return made


def train(
    stages: list[Any], schedule: Any, optimizer: Any, capture: bool, steps: int = STEPS, evals: bool = False
) -> tuple[list[Any], Any]:
    """Train, and return all that is to be seen after each step, and what ran."""
    device = stages[0].device
    runs = captured(schedule, optimizer=optimizer) if capture else schedule
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 16, device=device), torch.randn(8, 16, device=device)) for _ in range(steps)]
    first, last = (any(getattr(s, name) for s in stages) for name in ("is_first", "is_last"))
    seen = []
    torch.manual_seed(1)
    for i, (x, target) in enumerate(batches):
        losses: list[Tensor] = []
        given = ((x,) if first else ()), {"target": target if last else None}
        output = runs.step(*given[0], **given[1], losses=losses)
        if not capture:
            optimizer.step()
        scheduler.step()
        if evals:
            outputs = [output, runs.eval(*given[0], **given[1])]
        else:
            outputs = [output]
        grads = [p.grad for stage in stages for p in stage.submod.parameters()]
        state = [t.clone() for stage in stages for t in stage.submod.state_dict().values()]
        seen.append(
            (
                [None if o is None else o.detach().clone() for o in outputs],
                [loss.detach() for loss in losses],
                [None if g is None else g.clone() for g in grads],
                state,
            )
        )
        if i % 4 != 1:
            optimizer.zero_grad()
    return seen, runs


ENGINES = [(False, None), (True, False), (True, {"backend": "aten"}), (True, {})]


@pytest.mark.parametrize(("ours", "compile"), ENGINES, ids=["torch", "uncompiled", "aten", "inductor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_the_same_to_the_last_bit(name: str, ours: bool, compile: Any, group: Any) -> None:
    results = []
    for capture in (False, True):
        stages = stages_of(name, ours, compile)
        seen, runs = train(stages, schedule_of(name, stages), optimizer_of(stages), capture)
        results.append(seen)
    assert "2 graphs" in repr(runs) or "1 graphs" in repr(runs), repr(runs)
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=0, atol=0)
    runs.close()


@pytest.mark.parametrize(("ours", "name"), [(False, "GPipe"), (True, "GPipe"), (True, "ZBVZeroBubble")])
def test_evaluations_between_steps_are_replayed_too(ours: bool, name: str, group: Any) -> None:
    results = []
    for capture in (False, True):
        stages = stages_of(name, ours, False)
        schedule = schedule_of(name, stages)
        seen, runs = train(stages, schedule, optimizer_of(stages), capture, evals=True)
        results.append(seen)
    assert "graphs of" in repr(runs)
    assert not repr(runs).startswith("0")
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    runs.close()


@pytest.mark.parametrize("ours", [False, True])
def test_a_stage_that_waits_for_the_device_is_named_and_the_schedule_runs_as_ever(
    ours: bool, group: Any
) -> None:
    results = []
    for capture in (False, True):
        stages = stages_of("ZBVZeroBubble" if ours else "Interleaved1F1B", ours, False, Waiting)
        schedule = schedule_of("ZBVZeroBubble" if ours else "Interleaved1F1B", stages)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            seen, _ = train(stages, schedule, optimizer_of(stages), capture)
        results.append(seen)
    text = "".join(str(each.message) for each in said if "CUDA graph" in str(each.message))
    line = Waiting.forward.__code__.co_firstlineno + 2
    assert f"test_captured_on_cuda.py:{line}" in text, text
    assert "(Waiting)" in text, text
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    # Neither generators nor the allocator are left as in the midst of a recording.
    torch.manual_seed(3)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    torch.testing.assert_close(torch.rand(4, device="cuda"), drawn, rtol=0, atol=0)
    stages = stages_of("GPipe", True, False)
    _, again = train(stages, schedule_of("GPipe", stages), optimizer_of(stages), True)
    assert "not captured" not in repr(again)
    again.close()


def test_a_generator_of_a_module_goes_on_with_each_replay(group: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.generator = torch.Generator("cuda")

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.empty_like(x).normal_(generator=self.generator)
            return self.linear(x) + noise

    def outputs(capture: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = Noisy().cuda()
        module.generator.manual_seed(5)
        stage = PipelineStage(module, 0, 1, torch.device("cuda", 0))
        schedule = schedule_of("GPipe", [stage])
        runs = captured(schedule) if capture else schedule
        x, y = torch.ones(8, 16, device="cuda"), torch.ones(8, 16, device="cuda")
        found = [runs.step(x, target=y).detach().clone() for _ in range(6)]
        if capture:
            assert "1 graphs" in repr(runs) or "2 graphs" in repr(runs), repr(runs)
        return found

    torch.testing.assert_close(outputs(True), outputs(False), rtol=0, atol=0)


# Two devices.

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def _rank(rank: int, folder: str, job: Any, *args: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "nccl",
        store=store,
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
        device_id=torch.device("cuda", rank),
    )
    job(rank, *args)
    dist.destroy_process_group()


SECONDS = 40
"""How long a rank waits for the other."""


def run(job: Callable[..., None], *args: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, job, *args), nprocs=2)


def same_as_uncaptured(rank: int, ours: bool, compile: Any, names: list[str], evals: bool) -> None:
    for name in names:
        results = []
        for capture in (False, True):
            stages = stages_of(name, ours, compile, world=2, rank=rank)
            schedule = schedule_of(name, stages)
            seen, runs = train(stages, schedule, optimizer_of(stages), capture, steps=12, evals=evals)
            results.append(seen)
        assert f"{2 + evals} graphs" in repr(runs), repr(runs)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        print(f"rank {rank}: {name} ours={ours} compile={compile} evals={evals}: {runs}", flush=True)


@two_devices
@pytest.mark.parametrize(
    ("ours", "compile", "names", "evals"),
    [
        (False, None, ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"], False),
        (True, False, list(SCHEDULES), False),
        (True, {}, ["ZBVZeroBubble", "GPipe"], False),
        (True, {"backend": "aten"}, ["ZBVZeroBubble", "1F1B"], True),
    ],
    ids=["torch", "uncompiled", "inductor", "aten"],
)
def test_training_on_two_devices_is_the_same_to_the_last_bit(
    ours: bool, compile: Any, names: list[str], evals: bool
) -> None:
    run(same_as_uncaptured, ours, compile, names, evals)


def changed_on_one_rank(rank: int) -> None:
    results = []
    for capture in (False, True):
        stages = stages_of("ZBVZeroBubble", True, False, world=2, rank=rank)
        schedule = schedule_of("ZBVZeroBubble", stages)
        runs = captured(schedule) if capture else schedule
        x = torch.randn(8, 16, device=stages[0].device, generator=torch.Generator("cuda").manual_seed(0))
        seen = []
        for i in range(12):
            if i == 6 and rank == 1:
                stages[0].submod.drop.p = 0.1
            torch.manual_seed(i)
            given = ((x,), {"target": x}) if rank == 0 else ((), {})
            runs.step(*given[0], **given[1])
            seen += [p.grad.clone() for s in stages for p in s.submod.parameters() if p.grad is not None]
            for stage in stages:
                stage.submod.zero_grad()
        results.append(seen)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    print(f"rank {rank}: {runs}", flush=True)


@two_devices
def test_one_rank_may_run_a_step_as_it_is_while_the_other_replays_it() -> None:
    run(changed_on_one_rank)


def waits_on_one_rank(rank: int) -> None:
    stages = stages_of("1F1B", False, None, Waiting if rank == 1 else Block, world=2, rank=rank)
    runs = captured(schedule_of("1F1B", stages))
    x = torch.ones(8, 16, device=stages[0].device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            runs.step(*((x,) if rank == 0 else ()), target=x)
    text = "".join(str(each.message) for each in said)
    assert "rank 1: stage 1 of 2 (Waiting) cannot be captured" in text, text
    assert "not captured: rank 1" in repr(runs), repr(runs)
    print(f"rank {rank}: {runs}", flush=True)


@two_devices
def test_where_one_rank_cannot_capture_none_does_and_all_say_why() -> None:
    run(waits_on_one_rank)


def replicas(rank: int) -> None:
    results = []
    alone = [dist.new_group([r]) for r in range(2)][rank]
    for capture in (False, True):
        torch.manual_seed(0)
        device = torch.device("cuda", rank)
        stage = FunctionalPipelineStage(
            Block(16).to(device),
            0,
            1,
            device,
            group=alone,
            loss_fn=functional.mse_loss,
            data_parallel=dist.group.WORLD,
        )
        seen, runs = train([stage], schedule_of("GPipe", [stage]), optimizer_of([stage]), capture)
        results.append(seen)
        assert not capture or "graphs of" in repr(runs), repr(runs)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    print(f"rank {rank}: replicas {runs}", flush=True)


@two_devices
def test_gradients_are_averaged_over_replicas_in_the_graph() -> None:
    run(replicas)


def dies_in_the_midst(rank: int) -> None:
    stages = stages_of("1F1B", True, False, world=2, rank=rank)
    runs = captured(schedule_of("1F1B", stages))
    x = torch.ones(8, 16, device=stages[0].device)
    for i in range(8):
        if i == 6 and rank == 1:
            os._exit(7)
        runs.step(*((x,) if rank == 0 else ()), target=x)
        torch.cuda.synchronize()


@two_devices
def test_a_rank_that_dies_takes_the_other_with_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_rank, (folder, dies_in_the_midst), nprocs=2, join=False)
        codes = []
        for process in context.processes:
            process.join(SECONDS + 60)
            codes.append(process.exitcode)
            process.kill()
    assert codes == [1, 7]
