"""Where messages lie and which signals go with them: pure functions that all ranks compute alike.

An edge is a pair of neighbouring stages on two ranks, in the direction in which tensors go: activations down,
gradients up. For each microbatch of a step each edge has a slot of its own in the receiver's memory, and a
signal of its own that tells of its arrival: so messages may be sent, and be waited for, in any order. One
more signal of each edge goes the other way once a step: the receiver has begun, and its slots are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Edge(NamedTuple):
    """From one stage to another."""

    source: int
    target: int


class Slot(NamedTuple):
    """Where a tensor of a message lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """The tensor there.

        Args:
            memory: in bytes.
        """
        count = int(torch.Size(self.shape).numel()) * self.dtype.itemsize
        # `.data`, so that a write into one of the slots does not look like one into all of them.
        return memory[self.offset : self.offset + count].view(self.dtype).view(self.shape).data


Slots: TypeAlias = dict[Edge, list[list[Slot]]]
"""The slots of each edge, for each microbatch, for each tensor."""

READY = -1
"""In the place of a microbatch: the signal that slots are free."""

_ALIGNED = 256


def edges_between(rank_of: Mapping[int, int]) -> list[Edge]:
    """All edges of a pipeline whose ends are on two ranks.

    Args:
        rank_of: the rank of each stage.
    """
    pairs = [(stage, stage + 1) for stage in sorted(rank_of) if rank_of.get(stage + 1, -1) != rank_of[stage]]
    pairs = [pair for pair in pairs if pair[1] in rank_of]
    return [Edge(*ends) for a, b in pairs for ends in ((a, b), (b, a))]


def numbered(rank_of: Mapping[int, int], microbatches: int) -> dict[tuple[Edge, int], int]:
    """Number the signals of each edge: those from one rank to another one are told apart."""
    counts: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[Edge, int], int] = {}
    for edge in edges_between(rank_of):
        down = rank_of[edge.source], rank_of[edge.target]
        for chunk in (READY, *range(microbatches)):
            way = down[::-1] if chunk == READY else down
            found[edge, chunk] = counts[way]
            counts[way] += 1
    return found


def laid_out(messages: Mapping[Edge, Sequence[Sequence[Tensor]]]) -> tuple[Slots, int]:
    """Give each tensor that a rank receives a place.

    Args:
        messages: what each edge brings, for each microbatch, as tensors that look alike.

    Returns:
        The slots, and how many bytes they take.
    """
    slots: Slots = {}
    nbytes = 0
    for edge, of_chunks in messages.items():
        slots[edge] = []
        for tensors in of_chunks:
            placed = []
            for tensor in tensors:
                placed.append(Slot(nbytes, tuple(tensor.shape), tensor.dtype))
                nbytes += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
            slots[edge].append(placed)
    return slots, nbytes
