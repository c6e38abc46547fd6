"""Forks: a child has only the thread that forked, and everything as the others had left it in their midst.

Locks that others held are free in the child, and what they had lent to modules is put back. Residuals that
one of them was reading cannot be used there any more (`Turn`): nobody knows how far it had come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from funcstage.errors import ConsumedError


def lock() -> Any:
    """Make a reentrant lock that a child finds free, unless it is held by the thread that forked."""
    return free_in_children(threading.RLock())


def free_in_children(held: Any) -> Any:
    """Let children find a reentrant lock of somebody else's free as well."""
    _LOCKS.add(held)
    return held


_LOCKS: WeakSet[Any] = WeakSet()


class Turn:
    """Which thread uses residuals: others wait for it, but for those that a fork has taken away."""

    __slots__ = ("_lock", "_process")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = _process[0]

    @property
    def lost(self) -> bool:
        """Whether a thread that this process does not have was using them."""
        if self._process != _process[0] and self._lock.acquire(blocking=False):
            self._lock.release()
            self._process = _process[0]
        return self._process != _process[0]

    def taken(self) -> Any:
        """The lock to hold for one's turn; itself a function in C, which no interrupt comes into.

        Raises:
            ConsumedError: if the turn never comes.
        """
        if self.lost:
            raise ConsumedError(
                "Another thread was using these residuals when this process was forked from its own. Run F "
                "again in this process, or fork while no other thread uses them."
            )
        return self._lock


_process = [0]
"""How many forks lie behind this process."""


class lent:
    """What a thread lends to others for a while, as it lends tensors to a module.

    Args:
        put_back: called in a child that is forked meanwhile by another thread, which never takes it back.
    """

    def __init__(self, put_back: Callable[[], object]) -> None:
        self._put_back = put_back
        self._depth = 0

    def __enter__(self) -> None:
        stack = _lent.setdefault(threading.get_ident(), [])
        self._depth = len(stack)
        stack.append(self._put_back)

    def __exit__(self, *error: object) -> None:
        returned(self._depth)


_lent: dict[int, list[Callable[[], object]]] = {}


def lending() -> int:
    """How much this thread has lent."""
    return len(_lent.get(threading.get_ident(), ()))


def returned(depth: int) -> None:
    """Forget what this thread has lent since, which is back."""
    stack = _lent.get(threading.get_ident())
    if stack is not None:
        del stack[depth:]
        if not depth:
            del _lent[threading.get_ident()]


def in_children(then: Callable[[], object]) -> None:
    """Call a function in every child, when its locks are free."""
    _THEN.append(then)


_THEN: list[Callable[[], object]] = []


def _in_child() -> None:
    _process[0] += 1
    for held in list(_LOCKS):
        if not held._is_owned():
            held._at_fork_reinit()
    own = _lent.pop(threading.get_ident(), None)
    for stack in _lent.values():
        for put_back in reversed(stack):
            put_back()
    _lent.clear()
    if own is not None:
        _lent[threading.get_ident()] = own
    for then in _THEN:
        then()


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_in_child)
