"""Replaying F, I and W as CUDA graphs, with several microbatches in flight.

A CUDA graph writes where it wrote when it was captured. So every microbatch in flight has a *slot* of
its own: the three graphs with their inputs, residuals and results. A slot serves again once its tapes
are gone and nobody holds a result of it, which its storages' reference counts tell; no result is copied
and none is overwritten. Parameters and buffers are read where they lie, so updates in place are seen.

What one program hands to the next is its memory's only until the last reader is captured, which frees it
as it goes, so that I and W lie where F's residuals lay. The tapes have tensors over it that do not own it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcstage._torch.operators import copy_into_all
from funcstage._torch.tensors import memory_of, users_of
from funcstage.engines.graph.runners import plain_run
from funcstage.state.ambient import generators_kept, of_torch

if TYPE_CHECKING:
    from funcstage.engines.graph.programs import Step

MAX_SLOTS = 16
"""Microbatches that may be in flight as graphs, for each signature; further ones run without graphs."""

MAX_CAPTURES = 64
"""Captures for each signature, as parameters that move in memory need new ones; then no more graphs."""


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
        self._of_state = {memory_of(tensor) for tensor in state}
        self._lasting = set(self._of_state)
        self._captured: dict[str, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor | None]]] = {}
        self._owned: list[Tensor | None] = []
        self._frees = True
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

    def can_run(self, name: str, residuals: Sequence[Tensor | None]) -> bool:
        """Tell whether a program has been captured or can be: whether what it reads has not been freed."""
        return name in self._captured or all(
            residual is None or owner is not None for residual, owner in zip_longest(residuals, self._owned)
        )

    def run(
        self,
        name: str,
        step: Step,
        state: Sequence[Tensor],
        residuals: Sequence[Tensor | None] = (),
        given: Sequence[Tensor] = (),
        *,
        n_results: int,
        left: Collection[int] | None = (),
    ) -> list[Tensor | None]:
        """Replay a program, or capture it the first time.

        Args:
            name: the program's.
            step: it.
            state: parameters and buffers.
            residuals: what earlier programs of this slot have handed on, as `run` returned it.
            given: inputs from outside, which are copied in.
            n_results: how many results are the caller's; the others are residuals.
            left: which of `residuals` later programs read; `None` if it is one of several that read them in
                any order, so that they are never freed.

        Returns:
            The results, which lie in this slot.
        """
        if name not in self._captured:
            self._capture(name, step, state, residuals, given, n_results, left)
        graph, inputs, results = self._captured[name]
        if given:
            copy_into_all(inputs, list(given))
        graph.replay()
        return results

    def _capture(
        self,
        name: str,
        step: Step,
        state: Sequence[Tensor],
        residuals: Sequence[Tensor | None],
        given: Sequence[Tensor],
        n_results: int,
        left: Collection[int] | None,
    ) -> None:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in given]
        for place, value in zip(inputs, given, strict=True):
            place.copy_(value)
        device = torch.device("cuda", torch.cuda.current_device())
        # Kernels are loaded and tuned outside the capture, on this stream, which has its workspaces already.
        with generators_kept(of_torch([device])):  # the first replay draws what this drew
            step(state, (*self._owned, *inputs))
        graph = torch.cuda.CUDAGraph()
        read = step.inputs(state, (*self._owned, *inputs))
        self._frees &= left is not None
        if left is not None and self._frees:
            self._owned = [owner if i in left else None for i, owner in enumerate(self._owned)]
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = list(plain_run(step.runner(state), read))
        mine = [tensor for tensor in (*inputs, *results[:n_results]) if tensor is not None]
        self._lasting |= {memory_of(tensor) for tensor in mine}
        known = {
            memory_of(owner): residual.untyped_storage()
            for owner, residual in zip(self._owned, residuals, strict=False)
            if owner is not None and residual is not None
        }
        self._owned += results[n_results:]
        results[n_results:] = [self._without_owning(tensor, known) for tensor in results[n_results:]]
        self._captured[name] = graph, inputs, results
        del known  # which would count
        for tensor in (*mine, *results[n_results:]):
            self._count(tensor)

    def _without_owning(self, owner: Tensor | None, known: dict[int, torch.UntypedStorage]) -> Tensor | None:
        """A tensor over the same memory that does not keep it; such tensors share it as their owners do."""
        if owner is None or memory_of(owner) in self._lasting:
            return owner
        if not owner.untyped_storage().nbytes() or owner.is_conj() or owner.is_neg():
            return owner
        storage = known.get(memory_of(owner))
        if storage is None:
            storage = known[memory_of(owner)] = _storage_over(owner.untyped_storage())
        with torch.no_grad():
            return owner.new_empty(0).set_(storage, owner.storage_offset(), owner.shape, owner.stride())

    def _count(self, tensor: Tensor | None) -> None:
        if tensor is not None and (storage := memory_of(tensor)) not in self._of_state:
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


class _Memory:
    """What may be read and written of a device's memory (Numba's CUDA array interface, version 3)."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 3,
        }


def _storage_over(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A storage over the same memory, which frees nothing."""
    return torch.as_tensor(_Memory(storage), device=storage.device).untyped_storage()


def _places(state: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, state))


def handed_out(results: Sequence[Tensor | None]) -> list[Any]:
    """Results for the caller: tensors of their own over the slot's storage, whose references count."""
    return [None if result is None else result.detach() for result in results]
