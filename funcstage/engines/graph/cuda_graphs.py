"""Replaying F, I and W as CUDA graphs, with several microbatches in flight.

A CUDA graph writes where it wrote when it was captured. So every microbatch in flight has a *slot* of
its own: the three graphs with their inputs, residuals and results. A slot serves again once its tapes
are gone and nobody holds a result of it, which its storages' reference counts tell; no result is copied
and none is overwritten. Parameters and buffers are read where they lie, so updates in place are seen.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcstage._torch.operators import copy_into_all
from funcstage._torch.tensors import memory_of, users_of
from funcstage.state.ambient import generators_kept, of_torch

MAX_SLOTS = 16
"""Microbatches that may be in flight as graphs, for each signature; further ones run without graphs."""

MAX_CAPTURES = 64
"""Captures for each signature, as parameters that move in memory need new ones; then no more graphs."""

Run = Callable[[Sequence[Tensor], Sequence[Any]], Sequence[Tensor | None]]


class Flight:
    """One microbatch's claim on a slot; the slot is taken as long as this lives."""

    __slots__ = ("__weakref__", "slot")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Slot:
    """Storage and graphs for one microbatch in flight."""

    def __init__(self, state: Sequence[Tensor]) -> None:
        self.state = _places(state)
        self._pool = torch.cuda.graph_pool_handle()
        self._own = {memory_of(tensor) for tensor in state}
        self._captured: dict[str, tuple[torch.cuda.CUDAGraph, list[Any], list[Tensor | None]]] = {}
        self._counts: dict[int, int] = {}
        self._flight: weakref.ref[Flight] | None = None

    def claim(self) -> Flight:
        flight = Flight(self)
        self._flight = weakref.ref(flight)
        return flight

    def is_free(self) -> bool:
        """Tell whether neither a tape nor a result of the slot is in use."""
        if self._flight is not None and self._flight() is not None:
            return False
        return all(map(operator.le, map(users_of, self._counts), self._counts.values()))

    def run(
        self, name: str, program: Run, state: Sequence[Tensor], kept: Sequence[Any], given: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Replay a program, or capture it the first time.

        Args:
            name: the program's.
            program: it.
            state: parameters and buffers.
            kept: inputs that lie in this slot: results of its earlier programs.
            given: inputs from outside, which are copied in.

        Returns:
            The results, which lie in this slot.
        """
        if name not in self._captured:
            self._capture(name, program, state, kept, given)
        graph, inputs, results = self._captured[name]
        if given:
            copy_into_all(inputs, list(given))
        graph.replay()
        return results

    def _capture(
        self, name: str, program: Run, state: Sequence[Tensor], kept: Sequence[Any], given: Sequence[Tensor]
    ) -> None:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in given]
        for mine, theirs in zip(inputs, given, strict=True):
            mine.copy_(theirs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        device = torch.device("cuda", torch.cuda.current_device())
        # Kernels are loaded and tuned outside the capture. The first replay draws what this drew.
        with generators_kept(of_torch([device])), torch.cuda.stream(stream):
            program(state, (*kept, *inputs))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = list(program(state, (*kept, *inputs)))
        self._captured[name] = graph, inputs, results
        for _, given_to, made in self._captured.values():
            for tensor in (*given_to, *made):
                if isinstance(tensor, Tensor):
                    self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = memory_of(tensor)
        if storage not in self._own:
            self._counts.setdefault(storage, users_of(storage))


class SlotPool:
    """The slots of one signature."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._made = 0

    def claim(self, state: Sequence[Tensor]) -> Flight | None:
        """Take a free slot for these parameters and buffers; `None` when the pool is exhausted."""
        place = _places(state)
        for slot in self._slots:
            if slot.state == place and slot.is_free():
                return slot.claim()
        self._slots = [slot for slot in self._slots if slot.state == place or not slot.is_free()]
        if len(self._slots) >= MAX_SLOTS or self._made >= MAX_CAPTURES:
            return None
        self._made += 1
        self._slots.append(Slot(state))
        return self._slots[-1].claim()


def _places(state: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, state))


def handed_out(results: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Results for the caller: tensors of their own over the slot's storage, whose references count."""
    return [None if result is None else result.detach() for result in results]
