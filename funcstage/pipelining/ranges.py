"""Ranges in traces: what each action of a pipeline does, named as in "stage 2 I mb 5"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch.profiler import record_function

from funcstage._torch.profiling import is_listening

_Method = TypeVar("_Method", bound=Callable[..., Any])
_NOBODY_LISTENS: AbstractContextManager[Any] = nullcontext()


def range_of(stage: int, kind: str, microbatch: int) -> AbstractContextManager[Any]:
    """Name what runs inside for `torch.profiler` and, under `emit_nvtx`, for NVTX; 0.1 us if none listens."""
    if not is_listening():
        return _NOBODY_LISTENS
    return record_function(f"stage {stage} {kind} mb {microbatch}")


def in_range(kind: str) -> Callable[[_Method], _Method]:
    """Name what a stage's method does for a microbatch, which is its first argument.

    Args:
        kind: F or W; or B, which is I alone where the schedule splits the backward.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def named(self: Any, chunk: int, *args: Any, **kwargs: Any) -> Any:
            if not is_listening():
                return method(self, chunk, *args, **kwargs)
            split = kind == "B" and not (args[1] if len(args) > 1 else kwargs.get("full_backward", True))
            with range_of(self.stage_index, "I" if split else kind, chunk):
                return method(self, chunk, *args, **kwargs)

        return named  # type: ignore[return-value]

    return decorate
