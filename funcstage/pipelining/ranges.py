"""Ranges: what each action of a pipeline does, named as in "stage 2 I mb 5", for profilers and `logged`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from torch.profiler import record_function

from funcstage._torch.profiling import is_listening

_Method = TypeVar("_Method", bound=Callable[..., Any])
_NOBODY_LISTENS: AbstractContextManager[Any] = nullcontext()


class Meter(Protocol):
    """What measures the actions of a step, in the thread that runs them."""

    def action(self, stage: int, kind: str, microbatch: int, piece: str) -> AbstractContextManager[Any]:
        """Measure what runs inside."""

    def hold(self, pullbacks: Sequence[Any]) -> None:
        """Take note of what the running action leaves behind."""


class _Here(threading.local):
    meter: Meter | None = None


HERE = _Here()
"""Where this thread's meter is while a step is measured."""


def range_of(stage: int, kind: str, microbatch: int, piece: str = "") -> AbstractContextManager[Any]:
    """Name what runs inside for `torch.profiler` and, under `emit_nvtx`, for NVTX; 0.2 us if none listens."""
    if HERE.meter is not None:
        return HERE.meter.action(stage, kind, microbatch, piece)
    if not is_listening():
        return _NOBODY_LISTENS
    return named(stage, kind, microbatch, piece)


def named(stage: int, kind: str, microbatch: int, piece: str = "") -> AbstractContextManager[Any]:
    """Make the range that profilers see; a piece of W is named as in "stage 2 W mb 5, piece 1 of 2"."""
    return record_function(f"stage {stage} {kind} mb {microbatch}{piece}")


def leaves_behind(*pullbacks: Any) -> None:
    """Tell whoever measures this action what it leaves behind: a pullback, or weight pullbacks."""
    if HERE.meter is not None:
        HERE.meter.hold(pullbacks)


def in_range(kind: str) -> Callable[[_Method], _Method]:
    """Name what a stage's method does for a microbatch, which is its first argument.

    Args:
        kind: F or W; or B, which is I alone where the schedule splits the backward.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def in_its_range(self: Any, chunk: int, *args: Any, **kwargs: Any) -> Any:
            if HERE.meter is None and not is_listening():
                return method(self, chunk, *args, **kwargs)
            split = kind == "B" and not (args[1] if len(args) > 1 else kwargs.get("full_backward", True))
            with range_of(self.stage_index, "I" if split else kind, chunk):
                return method(self, chunk, *args, **kwargs)

        return in_its_range  # type: ignore[return-value]

    return decorate
