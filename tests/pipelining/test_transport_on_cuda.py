"""Messages written into the memory of the other GPU, against plain eager autograd on the whole model."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.nn import functional

from funcstage.pipelining import FunctionalPipelineStage, captured

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

WIDTH = 64
MICROBATCHES = 4
ONE_STAGE_A_RANK = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SCHEDULES = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
GROUP_SECONDS = 15
JOB_SECONDS = 80


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.down(self.up(x).tanh()) + (0 if skip is None else skip)
        return y, x


class Last(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return sum(super().forward(x, skip))


def model_of(n: int, device: torch.device) -> list[Block]:
    torch.manual_seed(0)
    return [(Last if i == n - 1 else Block)().to(device) for i in range(n)]


def stages_of(schedule: str, rank: int) -> list[int]:
    if schedule in ONE_STAGE_A_RANK:
        return [rank]
    return [rank, 3 - rank] if schedule in V_SHAPED else [rank, rank + 2]


def made(schedule: str, rank: int, n: int, modules: list[Block]) -> tuple[Any, list[Any]]:
    device = torch.device("cuda", rank)
    stages = [
        FunctionalPipelineStage(
            modules[i],
            i,
            n,
            device,
            compile={"backend": "aten"},
            loss_fn=functional.mse_loss,
            transport="symmetric",
        )
        for i in stages_of(schedule, rank)
    ]
    kind = schedules.get_schedule_class(schedule)
    one = issubclass(kind, schedules.PipelineScheduleSingle)
    return kind(stages[0] if one else stages, MICROBATCHES, loss_fn=stages[-1].loss_fn), stages


def through(whole: list[Block], x: Tensor) -> Tensor:
    value: Any = (x,)
    for module in whole:
        value = module(*(value if isinstance(value, tuple) else (value,)))
    return value


def train(rank: int, capture: bool) -> None:
    for schedule in SCHEDULES:
        train_under(rank, schedule, capture)


def train_under(rank: int, schedule: str, capture: bool) -> None:
    """Train with microbatches of two lengths in turn; gradients, losses and outputs are eager's."""
    device, n = torch.device("cuda", rank), 2 if schedule in ONE_STAGE_A_RANK else 4
    modules, whole = model_of(n, device), model_of(n, device)
    runs, stages = made(schedule, rank, n, modules)
    runs = captured(runs) if capture else runs
    mine = stages_of(schedule, rank)
    parameters = [p for i in mine for p in modules[i].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    torch.manual_seed(1)
    for step in range(12):
        rows = 8 if step % 3 else 24
        x, target = (torch.randn(MICROBATCHES * rows, WIDTH, device=device) for _ in range(2))
        losses: list[Tensor] = []
        given = {"target": target if n - 1 in mine else None, "losses": losses}
        output = runs.step(*[x] * (0 in mine), **given)
        assert all(stage.route is not None for stage in stages)
        value = through(whole, x)
        loss = functional.mse_loss(value, target)
        loss.backward()
        close = {"rtol": 1e-3, "atol": 1e-5}
        if n - 1 in mine:
            torch.testing.assert_close(output, value.detach(), **close)
            torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), **close)
        found = [p.grad for p in parameters]
        wanted = [p.grad for i in mine for p in whole[i].parameters()]
        torch.testing.assert_close(found, wanted, **close)
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 3:  # with no gradients there: torch's schedules divide those in evaluations, too
            evaluated = runs.eval(*[x] * (0 in mine), target=given["target"])
        with torch.no_grad():
            for p in (p for module in whole for p in module.parameters()):
                assert p.grad is not None
                p.sub_(0.01 * p.grad)
                p.grad = None
        if step % 4 == 3 and n - 1 in mine:
            torch.testing.assert_close(evaluated, through(whole, x).detach(), **close)
    if capture:
        assert "not captured" not in repr(runs)
        runs.close()


def die_between_steps(rank: int, capture: bool) -> None:
    """The second rank ends between two steps; the first says how long it waited for it."""
    device = torch.device("cuda", rank)
    modules = model_of(4, device)
    schedule, _ = made("ZBVZeroBubble", rank, 4, modules)
    runs = captured(schedule) if capture else schedule
    x = torch.randn(8, WIDTH, device=device)
    for _ in range(5):
        runs.step(*[x] * (rank == 0), target=x if rank == 0 else None)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        os._exit(7)
    begin = time.monotonic()
    try:
        runs.step(x, target=x)
        torch.cuda.synchronize()
    except RuntimeError:
        assert time.monotonic() - begin < 3 * GROUP_SECONDS
        os._exit(8)
    os._exit(9)


def _process(rank: int, store: str, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    faulthandler.dump_traceback_later(JOB_SECONDS, exit=True)
    limit = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit, device_id=device
    )
    job(rank, *args)
    dist.destroy_process_group()


def started(job: Callable[..., None], *args: Any) -> list[int | None]:
    """Run a job on two ranks, and return the codes that their processes end with."""
    with tempfile.TemporaryDirectory() as directory:
        context = mp.get_context("spawn")
        given = [(rank, f"{directory}/store", job, args) for rank in range(2)]
        processes = [context.Process(target=_process, args=each) for each in given]
        for process in processes:
            process.start()
        deadline = time.monotonic() + JOB_SECONDS + 10
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes


@pytest.mark.parametrize("capture", [False, True], ids=["as it is", "captured"])
def test_steps_are_those_of_the_whole_model_under_all_schedules(capture: bool) -> None:
    assert started(train, capture) == [0, 0]


@pytest.mark.parametrize("capture", [False, True], ids=["as it is", "captured"])
def test_a_rank_that_dies_ends_the_wait_of_the_other_in_bounded_time(capture: bool) -> None:
    first, second = started(die_between_steps, capture)
    assert second == 7
    # The watchdogs of captured steps (1) and of NCCL (-6) may be the first to notice.
    assert first in (8, 1, -6)
