"""What a trace has left outside of its module, in containers and caches: its tensors may not stay there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from funcstage._torch.tensors import is_functional
from funcstage.state.caches import Cache
from funcstage.state.kept import differs, refill
from funcstage.state.shared import Name


class LeftBehind:
    """What is within a stage's reach and may hold tensors, with what it held when it was come upon."""

    def __init__(self) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._caches: list[Cache] = []
        self._named: dict[int, tuple[Any, dict[str, Any]]] = {}

    def reach(self, value: Any) -> None:
        """Take note of a value, if it is one of these."""
        if isinstance(value, (dict, list, deque, set)) and len(value) <= _LONG:
            contents = dict(value) if isinstance(value, dict) else [*value]
            self._containers.append((value, contents))
        self._caches += Cache.among([value])
        if type(getattr(value, "__dict__", None)) is dict and not isinstance(value, nn.Module):
            self.reach_named(value)

    def reach_named(self, holder: Any) -> None:
        """Take note of globals, or of the attributes of a function, a class or an object."""
        owner = holder if isinstance(holder, (dict, type)) else vars(holder)
        self._named.setdefault(id(owner), (owner, dict(_entries(owner))))

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
        for owner, before in self._named.values():
            for key, value in [*_entries(owner).items()]:
                if is_made_in_trace(value):
                    name = Name(owner, key, is_assigned=True)
                    name.assign(before.get(key, name))


def _entries(owner: Any) -> Mapping[str, Any]:
    return vars(owner) if isinstance(owner, type) else owner


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
