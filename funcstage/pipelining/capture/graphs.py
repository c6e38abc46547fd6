"""CUDA graphs of whole steps: one stream that they are recorded on, one pool of memory for all of them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch

from funcstage._torch.graphs import abandon

T = TypeVar("T")


class Recording(Protocol):
    """Work that can be done again."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    """What records steps: `Graphs`, or in tests what stands in for it."""

    def prepared(self) -> AbstractContextManager[object]: ...

    def record(self, step: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Recording, T]: ...


class _Streams(threading.local):
    """The stream of this thread on each device, as libraries keep workspaces for each stream."""

    def __init__(self) -> None:
        self.on: dict[torch.device, torch.cuda.Stream] = {}


_STREAMS = _Streams()


def _stream_on(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS.on:
        _STREAMS.on[device] = torch.cuda.Stream(device)
    return _STREAMS.on[device]


class Graphs:
    """Records steps as CUDA graphs.

    Args:
        device: the one that they run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Run a step as it is where it is going to be recorded: libraries keep something for each stream."""
        caller, stream = torch.cuda.current_stream(self.device), _stream_on(self.device)
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            caller.wait_stream(stream)

    def record(self, step: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Recording, T]:
        """Record what a step does on the device, which does nothing yet.

        Args:
            step: the step.
            generators: of random numbers, which go on in each replay; torch's own always does.

        Returns:
            The graph, and what the step returned: tensors that each replay overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        torch.cuda.synchronize(self.device)
        gc.collect()  # nothing that is freed in the midst of it has a place in the graph
        torch.cuda.empty_cache()
        torch.clear_autocast_cache()
        try:
            with torch.cuda.device(self.device), self.prepared():
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    result = step()
                    graph.capture_end()
                except BaseException:
                    abandon(graph, self.device, self._pool)
                    raise
        finally:
            torch.clear_autocast_cache()
        return graph, result
