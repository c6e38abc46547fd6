"""Those who wait for the next step of a rank notice that it was killed, and go on waiting if it is late."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_ranks import run
from torch import nn
from torch.distributed.pipelining import schedules
from torch.nn import functional

from funcstage.pipelining import FunctionalPipelineStage

pytestmark = pytest.mark.timeout(300)


def schedule_of(rank: int, group: Any) -> Any:
    torch.manual_seed(rank)
    stage = FunctionalPipelineStage(nn.Linear(4, 4), rank, 2, "cpu", group=group)
    return schedules.Schedule1F1B(stage, 4, loss_fn=functional.mse_loss)


def dies(rank: int, killed: int, store: str, answer: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    schedule = schedule_of(rank, None)
    args = [torch.ones(8, 4)] if rank == 0 else []
    schedule.step(*args, target=torch.ones(8, 4))
    answer.send("has run a step")
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        schedule.step(*args, target=torch.ones(8, 4))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_between_steps_is_noticed_before_the_timeout_of_half_an_hour(
    killed: int, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=dies, args=(rank, killed, str(tmp_path / "store"), theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    survivor = pipes[1 - killed][0]
    try:
        for _ in range(2):
            assert survivor.poll(200)
            said = survivor.recv()
        assert re.match("RuntimeError: .*gloo", said), said
    finally:
        for process in processes:
            process.kill()
            process.join()


def is_late(rank: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    schedule = schedule_of(rank, group)
    for step in range(3):
        if rank == 0:
            time.sleep(1.5 * step)  # longer than the others wait without looking around
        losses: list[torch.Tensor] = []
        schedule.step(*([torch.ones(8, 4)] if rank == 0 else []), target=torch.ones(8, 4), losses=losses)
    return [loss.detach() for loss in losses]


@pytest.mark.slow
def test_a_rank_that_is_late_is_waited_for() -> None:
    modules = []
    for rank in range(2):
        torch.manual_seed(rank)
        modules.append(nn.Linear(4, 4))
    with torch.no_grad():
        loss = functional.mse_loss(nn.Sequential(*modules)(torch.ones(2, 4)), torch.ones(2, 4))
    torch.testing.assert_close(run(2, is_late)[1], [loss] * 4)


def crashes_once(rank: int, group: Any, mark: str) -> int:
    if rank == 1 and not Path(mark).exists():
        Path(mark).touch()
        os.abort()
    dist.barrier(group)
    return rank


@pytest.mark.slow
def test_a_job_of_the_tests_runs_again_where_a_rank_crashed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"crashes_once: rank 1 SIGABRT. The job runs again."):
        assert run(2, crashes_once, str(tmp_path / "mark")) == [0, 1]
