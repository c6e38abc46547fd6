"""What a trace has left outside of its module, in containers and caches: its tensors may not stay there."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from funcstage._torch.tensors import is_functional
from funcstage.state.caches import Cache
from funcstage.state.kept import differs, refill


class LeftBehind:
    """Containers and caches within a stage's reach, with what they held when they were come upon."""

    def __init__(self) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._caches: list[Cache] = []

    def reach(self, value: Any) -> None:
        """Take note of a value, if it is one of these."""
        if isinstance(value, (dict, list, deque, set)) and len(value) <= _LONG:
            contents = dict(value) if isinstance(value, dict) else [*value]
            self._containers.append((value, contents))
        self._caches += Cache.among([value])

    def empty_caches(self) -> None:
        """Let caches compute anew what the trace has computed."""
        for cache in self._caches:
            cache.forget(is_functional)

    def restore(self) -> None:
        """Put back what held no tensors of the trace, and does now."""
        self.empty_caches()
        for container, contents in self._containers:
            if differs(container, contents) and _holds_traced(container):
                refill(container, contents)


def is_made_in_trace(value: Any) -> bool:
    """Tell whether a value is a tensor of the trace, or a list, tuple or dict of some."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(each, Tensor) and is_functional(each) for each in (value, *inside))


def _holds_traced(container: Any, depth: int = 3) -> bool:
    inside = container.values() if isinstance(container, dict) else container
    return any(
        is_functional(each) if isinstance(each, Tensor) else _holds_traced(each, depth - 1)
        for each in inside
        if isinstance(each, Tensor) or (depth and isinstance(each, _NESTED) and len(each) <= _LONG)
    )


_LONG = 1000
_NESTED = (dict, list, tuple, deque, set)
