"""Calls of modules, which somebody may be asked about while a stage runs.

`nn.Module.__call__` is exchanged meanwhile, as `torch.fx` does. Other threads, and everybody once no stage
runs, have torch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from funcstage import forks

Asked: TypeAlias = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Gets torch's own `__call__`, the module and its arguments, and returns the result."""


class asking_about_calls:  # used as a function
    """Ask about the calls of modules in this thread, or nobody."""

    def __init__(self, asked: Asked | None) -> None:
        self._asked = asked
        self._before = current()

    def __enter__(self) -> None:
        _of_thread.asked = self._asked
        _patch.hold(self._before.depth + 1)

    def __exit__(self, *error: object) -> None:
        restore(self._before)


class Current(NamedTuple):
    """Who is asked in this thread, and how many have asked to be."""

    asked: Asked | None
    depth: int


def current() -> Current:
    """What holds in this thread."""
    return Current(_of_thread.asked, _patch.depth())


def restore(before: Current) -> None:
    """Let it hold again."""
    if before.depth != _patch.depth():
        _patch.hold(before.depth)
    _of_thread.asked = before.asked


class _OfThread(threading.local):
    asked: Asked | None = None


_of_thread = _OfThread()
_OWN: Any = nn.Module.__call__


def _asking(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    asked = _of_thread.asked
    return _OWN(module, *args, **kwargs) if asked is None else asked(_OWN, module, args, kwargs)


class _Patch:
    """The patch, in place while any thread asks."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._depths: dict[int, int] = {}  # by thread

    def depth(self) -> int:
        """How deep this thread is in stages that ask."""
        return self._depths.get(threading.get_ident(), 0)

    def alone(self) -> None:
        """Be in place for this thread only, after a fork."""
        depth = self.depth()
        self._depths.clear()
        self.hold(depth)

    def hold(self, depth: int) -> None:
        """Be in place as long as any thread holds it; may be broken off anywhere, and called again."""
        kind: Any = nn.Module
        with self._lock:
            self._depths[threading.get_ident()] = depth
            if not depth:
                del self._depths[threading.get_ident()]
            if self._depths and kind.__call__ is _OWN:
                kind.__call__ = _asking
            elif not self._depths and kind.__call__ is _asking:
                kind.__call__ = _OWN


_patch = _Patch()
forks.in_children(_patch.alone)
