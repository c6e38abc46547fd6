"""CUDA graphs from inside: what torch leaves behind where one could not be recorded."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch

__all__ = ["abandon"]


def abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Leave a recording that has failed; to be called on the stream that is being recorded.

    torch ends neither the use of the graph's pool by the allocator nor the recording of random generators
    where the recording itself turns out to be invalid.
    """
    with suppress(RuntimeError):
        graph.capture_end()
        return
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with suppress(RuntimeError):
        graph.reset()
    again = torch.cuda.CUDAGraph()  # one that succeeds puts the generators right
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        again.capture_begin(capture_error_mode="thread_local")
        again.capture_end()
