"""Functions that torch.compile has compiled, inside of stages: they run there as they were written.

Levels and traces cannot see into a compiled function, whose forward and backward are whole; what it was
made from they split as everything else.
Private: the setting that refuses compiled functions in traces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled functions run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def uncompiled_in_trace() -> Iterator[None]:
    """The same while a graph is recorded."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False), uncompiled():
        yield
