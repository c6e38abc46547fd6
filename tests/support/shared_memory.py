"""Memory that the processes of one host share, with signals: a medium for messages without any GPU."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcstage._torch import symmetric
from funcstage._torch.distributed import timeout_of
from funcstage.pipelining import constructors
from funcstage.pipelining.transport import choice


class SharedMemory:
    """As `symmetric.Memory`: what that does on a stream, this has done when it returns."""

    def __init__(self, nbytes: int, signals: int, group: Any, device: torch.device) -> None:
        rank, world = dist.get_rank(group), group.size()
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, group_src=0, group=group)
        paths = [Path(tempfile.gettempdir()) / f"{name[0]} {r}" for r in range(world)]
        whole = nbytes + 4 * signals * world
        paths[rank].write_bytes(bytes(whole))
        dist.barrier(group)
        self._all = [torch.from_file(str(path), True, whole, dtype=torch.uint8) for path in paths]
        dist.barrier(group)
        paths[rank].unlink()
        self._nbytes, self._signals, self._rank = nbytes, signals, rank
        self._words = [each[nbytes:].view(torch.int32).view(world, signals) for each in self._all]
        self._seconds = timeout_of(group, device)
        self.puts = 0

    @property
    def own(self) -> Tensor:
        return self.of(self._rank)

    def of(self, rank: int) -> Tensor:
        return self._all[rank][: self._nbytes]

    def put(self, rank: int, signal: int) -> None:
        self._turn(self._words[rank][self._rank], signal, 1)
        self.puts += 1

    def wait(self, rank: int, signal: int) -> None:
        self._turn(self._words[self._rank][rank], signal, 0)

    def _turn(self, words: Tensor, signal: int, to: int) -> None:
        deadline = time.monotonic() + self._seconds
        while words[signal] == to:
            if time.monotonic() > deadline:
                raise RuntimeError(f"signal {signal} timed out")
            time.sleep(1e-4)
        words[signal] = to

    def beside(self) -> Any:
        return nullcontext()

    def mark(self) -> None:
        return None

    def join(self, mark: None) -> None:
        pass


@contextmanager
def over_shared_memory(
    reach: bool = True, on: type[SharedMemory] = SharedMemory
) -> Iterator[list[SharedMemory]]:
    """Let CPUs be devices that write into each other's memory.

    Args:
        reach: whether those of different ranks do.
        on: what is used as memory.

    Yields:
        The memory that has been made.
    """
    made = []

    def make(nbytes: int, signals: int, group: Any, device: torch.device) -> SharedMemory:
        made.append(on(nbytes, signals, group, device))
        return made[-1]

    def place(device: torch.device) -> tuple[str, str, tuple[str, ...]]:
        ranks = tuple(f"cpu of rank {rank}" for rank in range(dist.get_world_size()))
        return symmetric.host(), ranks[dist.get_rank()], ranks if reach else ()

    choice.MEDIA["cpu"] = choice.Medium(place, make)
    constructors._ABSENT_SECONDS["gloo"] = 5.0  # other backends wait for ranks that come late
    try:
        yield made
    finally:
        del choice.MEDIA["cpu"]
        constructors._ABSENT_SECONDS["gloo"] = 0.0
