"""The messages of a rank's stages, written straight into the memory of its peers, in the order of signals.

The receiver of an edge says once a step that it has begun: all that it did with its slots in the step before
comes earlier on its stream. The sender waits for that before its first message of the step, beside its other
work; then it copies each message into its slot and signals it. The receiver waits for the signal where
it first reads the message. So no wait can be for something that comes later in the order of either rank, and
no receive is under way before it is needed.

A wait that takes longer than the group's timeout ends in an error, as does all work on that device.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from funcstage.errors import StructureError
from funcstage.pipelining.transport.choice import MEDIA
from funcstage.pipelining.transport.layout import READY, Edge, Slots, edges_between, laid_out, numbered

_BEHIND = 1
"""How many messages may be under way when the next one is sent; what was sent is kept until then."""


class Memory(Protocol):
    """Memory of this rank and its peers, with signals: `symmetric.Memory`, or in tests another."""

    @property
    def own(self) -> Tensor: ...

    def of(self, rank: int) -> Tensor: ...

    def put(self, rank: int, signal: int) -> None: ...

    def wait(self, rank: int, signal: int) -> None: ...

    def beside(self) -> AbstractContextManager[None]: ...

    def mark(self) -> Any: ...

    def join(self, mark: Any) -> None: ...


class Route:
    """Where the messages of a rank's stages go, and come.

    Args:
        memory: of this rank and its peers.
        rank_of: the rank of each stage.
        signals: the number of each signal.
        here: the slots of this rank.
        there: those of its peers.
    """

    def __init__(
        self,
        memory: Memory,
        rank_of: Mapping[int, int],
        signals: Mapping[tuple[Edge, int], int],
        here: Slots,
        there: Slots,
    ) -> None:
        self.memory = memory
        self._rank_of = dict(rank_of)
        self._signals = signals
        own = memory.own
        self._here = {e: [[s.of(own) for s in chunk] for chunk in chunks] for e, chunks in here.items()}
        self._there = {
            edge: [[slot.of(memory.of(rank_of[edge.target])) for slot in chunk] for chunk in chunks]
            for edge, chunks in there.items()
        }
        self._granted: set[Edge] = set()
        self._sent: deque[tuple[Any, list[Tensor]]] = deque()

    def __copy__(self) -> Route:
        """It is the same route for all who have it."""
        return self

    def begin(self) -> None:
        """Begin a step: what lies in the slots is no longer needed."""
        self._granted.clear()
        self._sent.clear()
        for edge, chunks in self._here.items():
            if any(chunks):
                self.memory.put(self._rank_of[edge.source], self._signals[edge, READY])

    def send(self, edge: Edge, chunk: int, tensors: Sequence[Tensor]) -> None:
        """Send a message.

        Args:
            edge: from which stage to which.
            chunk: the number of the microbatch.
            tensors: what it is made of.
        """
        if not tensors:
            return
        rank, whole = self._rank_of[edge.target], [tensor.contiguous() for tensor in tensors]
        with self.memory.beside(), torch.no_grad():
            if edge not in self._granted:
                self.memory.wait(rank, self._signals[edge, READY])
                self._granted.add(edge)
            for slot, tensor in zip(self._there[edge][chunk], whole, strict=True):
                slot.copy_(tensor, non_blocking=True)
            self.memory.put(rank, self._signals[edge, chunk])
        self._sent.append((self.memory.mark(), whole))
        self._join(_BEHIND)

    def receive(self, edge: Edge, chunk: int) -> list[Tensor]:
        """Wait for a message, and return what it is made of: memory that the next step overwrites."""
        tensors = self._here[edge][chunk]
        if tensors:
            self.memory.wait(self._rank_of[edge.source], self._signals[edge, chunk])
        return tensors

    def slots(self, edge: Edge, chunk: int) -> list[Tensor]:
        """Where a message is going to arrive."""
        return self._here[edge][chunk]

    def finish(self) -> None:
        """End a step: all has been sent."""
        self._join(0)

    def _join(self, behind: int) -> None:
        while len(self._sent) > behind:
            self.memory.join(self._sent.popleft()[0])


def open_route(
    stages: Sequence[Any], microbatches: int, messages: Mapping[Edge, Sequence[Sequence[Tensor]]] | None
) -> Route | None:
    """Make the route of this rank; all ranks of the pipeline's group do so at once.

    Args:
        stages: of this rank.
        microbatches: of a step.
        messages: what this rank receives; nothing if its stages cannot run.

    Returns:
        The route; nothing if the stages of some rank cannot run, or there is no memory for it.

    Raises:
        StructureError: if some rank could not make the memory for it, and some insists on that.
    """
    stage = stages[0]
    group, rank_of = stage.group or dist.group.WORLD, stage.stage_index_to_group_rank
    here, nbytes = laid_out(messages or {})
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, None if messages is None else (here, nbytes), group=group)
    if any(each is None for each in told):
        return None
    there = {edge: slots for each, _ in told for edge, slots in each.items()}
    signals = numbered(rank_of, microbatches)
    largest = max(max(nbytes for _, nbytes in told), 1)
    memory = None if stage.route is None else stage.route.memory
    if memory is None or memory.own.nbytes < largest:  # on all ranks, which have as much
        memory = _opened(stages, largest, max(signals.values()) + 1)
        if memory is None:
            return None
    mine = dist.get_rank(group)
    out = [edge for edge in edges_between(rank_of) if rank_of[edge.source] == mine]
    return Route(memory, rank_of, signals, here, {edge: there[edge] for edge in out if edge in there})


def _opened(stages: Sequence[Any], nbytes: int, signals: int) -> Memory | None:
    """Make memory on all ranks, or on none."""
    group, device, memory, failed = stages[0].group or dist.group.WORLD, stages[0].device, None, ""
    try:
        memory = MEDIA[device.type].open(nbytes, signals, group, device)
    except RuntimeError as error:
        failed = str(error).splitlines()[0]
    told: list[Any] = [None] * dist.get_world_size(group)
    insists = any(getattr(each, "transport", "") == "symmetric" for each in stages)
    dist.all_gather_object(told, (failed, insists), group=group)
    reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(told) if reason]
    if reasons:
        text = f"there is no memory that peers can write into ({'; '.join(reasons)})"
        if any(insists for _, insists in told):
            raise StructureError(f'transport="symmetric": {text}. Give all stages transport="auto".')
        warnings.warn(f"{text}, so messages go through the process group.", stacklevel=2)
        return None
    return memory
