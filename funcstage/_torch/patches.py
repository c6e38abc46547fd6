"""Patches of torch, in place for the whole process while any thread is in something that needs them."""

from __future__ import annotations

import threading

from funcstage import forks


class Patch:
    """A patch, with how deep each thread is in what needs it."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._depths: dict[int, int] = {}  # by thread
        forks.in_children(self._alone)

    def depth(self) -> int:
        """How deep this thread is in what needs it."""
        return self._depths.get(threading.get_ident(), 0)

    def hold(self, depth: int) -> None:
        """Be in place as long as any thread holds it; may be broken off anywhere, and called again."""
        with self._lock:
            if depth:
                self._depths[threading.get_ident()] = depth
            else:
                self._depths.pop(threading.get_ident(), None)
            self._put(bool(self._depths))

    def _put(self, wanted: bool) -> None:
        """See that it is in place, or is not; may be broken off anywhere, and called again."""
        raise NotImplementedError

    def _alone(self) -> None:
        """Be in place for this thread only, after a fork."""
        depth = self.depth()
        self._depths.clear()
        self.hold(depth)
