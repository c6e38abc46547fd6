"""Processes for the tests of pipelines on torch.distributed: a pool for each world size, which stays up.

A job is a function of a module that the ranks can import. It runs on every rank at once, with a process
group of its own, so that one that fails leaves nothing behind for the next; the group ends when all have
answered. Whoever does not answer in time is killed, and the pool is started anew when it is next needed.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

JOB_SECONDS = 400
"""How long a job may take."""

GROUP_SECONDS = 150
"""How long a rank waits for another one."""


MANY_GROUPS = 24
"""With how many process groups ranks are started anew: those of meshes stay, each with threads that poll."""


class Crashed(RuntimeError):
    """A rank that its own machine code ended: what it was at in Python is on stderr."""


class Raised(NamedTuple):
    """The error that a job ended with on a rank."""

    kinds: tuple[str, ...]
    message: str


class Ranks:
    """A pool of processes, one for each rank.

    Args:
        world_size: how many.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._directory = tempfile.TemporaryDirectory(prefix="ranks")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the ranks are enough processes
        # Forked from one process that has imported torch, ranks start in no time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["funcstage.pipelining", "torch._dynamo"])
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes = [ours for ours, _ in pairs]
        store = f"file://{self._directory.name}/store"
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self._processes, pairs, strict=True):
            process.start()
            theirs.close()

    def run(
        self, job: Callable[..., Any], *args: Any, group_seconds: float = GROUP_SECONDS, **kwargs: Any
    ) -> list[Any]:
        """Run `job(rank, group, *args, **kwargs)` on every rank.

        Returns:
            What each rank returned, or a `Raised`.

        Raises:
            TimeoutError: if a rank did not answer in time; all are killed.
            Crashed: if one was ended by a signal; likewise.
        """
        for pipe in self._pipes:
            pipe.send((job, args, kwargs, group_seconds))
        answers: dict[int, tuple[Any, int]] = {}
        deadline = time.monotonic() + JOB_SECONDS
        while len(answers) < self.world_size:
            silent = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(silent), timeout=max(0.0, deadline - time.monotonic()))
            try:
                answers.update({silent[pipe]: pipe.recv() for pipe in ready})  # type: ignore[index, union-attr]
            except EOFError:
                ready = []
            if not ready:
                signals = self._signals()
                self.stop()
                if signals:
                    raise Crashed(f"{job.__name__}: {signals}.")
                raise TimeoutError(f"{job.__name__}: no answer from rank(s) {sorted(silent.values())}.")
        if max(groups for _, groups in answers.values()) > MANY_GROUPS:
            self.stop()
        else:
            for pipe in self._pipes:
                pipe.send(None)
        return [answers[rank][0] for rank in range(self.world_size)]

    def _signals(self) -> str:
        """Return which ranks were ended by which signals."""
        for process in self._processes:
            process.join(0.2)
        ended = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        return ", ".join(
            f"rank {r} {signal.Signals(-code).name}" for r, code in ended.items() if code and code < 0
        )

    def stop(self) -> None:
        """Kill the processes."""
        _pools.pop(self.world_size, None)
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()


_pools: dict[int, Ranks] = {}


def ranks(world_size: int) -> Ranks:
    """Return the pool of a world size, started when first needed."""
    if world_size not in _pools:
        _pools[world_size] = Ranks(world_size)
    return _pools[world_size]


def run(world_size: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Run a job that has to succeed on every rank, and return what each returned.

    It runs again, with a warning, where a rank crashed: funcstage has no machine code, and a double free that
    once ended a rank did not come again in dozens of runs.
    """
    try:
        answers = ranks(world_size).run(job, *args, **kwargs)
    except Crashed as crash:
        warnings.warn(f"{crash} The job runs again.", stacklevel=2)
        answers = ranks(world_size).run(job, *args, **kwargs)
    for rank, answer in enumerate(answers):
        if isinstance(answer, Raised):
            raise AssertionError(f"{job.__name__} failed on rank {rank}: {answer.message}")
    return answers


@atexit.register
def _stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    faulthandler.enable()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # whole schedules, at an error
    timeout = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    while True:
        job, args, kwargs, group_seconds = pipe.recv()
        group = dist.new_group(timeout=timedelta(seconds=group_seconds))
        try:
            answer = job(rank, group, *args, **kwargs)
        except Exception as error:
            kinds = tuple(kind.__name__ for kind in type(error).__mro__)
            notes = "\n".join(getattr(error, "__notes__", ()))
            answer = Raised(kinds, f"{kinds[0]}: {error}\n{notes}".strip())
        pipe.send((answer, len(dist.distributed_c10d._world.pg_map)))
        pipe.recv()  # all have answered: until then a rank may be reading what this one has sent
        dist.destroy_process_group(group)
