"""Calls of modules, which somebody may be asked about while a stage runs.

`nn.Module.__call__` is exchanged meanwhile, as `torch.fx` does. Other threads, and everybody once no stage
runs, have torch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from funcstage._torch.patches import Patch

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


class _Patch(Patch):
    """Of `nn.Module.__call__`, while any thread asks."""

    def _put(self, wanted: bool) -> None:
        kind: Any = nn.Module
        if wanted and kind.__call__ is _OWN:
            kind.__call__ = _asking
        elif not wanted and kind.__call__ is _asking:
            kind.__call__ = _OWN


_patch = _Patch()
