"""Replays that do not end: torch watches over messages that it has sent itself, not over those of a graph.

A rank whose neighbour has died would wait for it for ever. A thread looks whether each replay is done
within the group's timeout, or whether another rank has said that it fails, and then ends the process, as
torch does with messages that do not arrive.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn, Protocol

_PAUSE = 0.5
"""Seconds between two looks."""

_PATIENCE = 5.0
"""Seconds that a replay may go on for after another rank has failed."""


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool: ...


class Watchdog:
    """Watches over replays.

    Args:
        timeout: seconds that one may take.
        failed: says what another rank has failed with, if one has.
        end: what to do with the reason for it.
    """

    def __init__(
        self, timeout: float, failed: Callable[[], str | None], end: Callable[[str], object] | None = None
    ) -> None:
        self._timeout = timeout
        self._failed = failed
        self._end = end or end_process
        self._pending: deque[Event] = deque()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, event: Event) -> None:
        """Watch over what comes before an event."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="funcstage watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # Python's end would break it off in a call, which ends in an abort
        self._pending.append(event)
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._wake.set()
        atexit.unregister(self.close)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        began, first = time.monotonic(), None
        while not self._closed.is_set():
            if not self._pending:
                self._wake.clear()
                if not self._pending:
                    self._wake.wait()
                continue
            if self._pending[0] is not first:
                began, first = time.monotonic(), self._pending[0]
            try:
                done = first.query()
            except RuntimeError:
                return  # the device has failed, which whoever uses it is told
            if done:
                self._pending.popleft()
                continue
            waited = time.monotonic() - began
            if waited > min(_PATIENCE, self._timeout):
                reason = self._failed()
                if reason is None and waited > self._timeout:
                    reason = f"it has waited {waited:.0f} s for other ranks, longer than the group's timeout"
                if reason is not None:
                    self._end(reason)
                    return
            self._closed.wait(min(_PAUSE, self._timeout / 4))


def end_process(reason: str) -> NoReturn:
    """End the process: its device waits for a message that never comes, and so would all who wait for it."""
    sys.stderr.write(f"funcstage: a captured step cannot go on: {reason}. The process ends.\n")
    sys.stderr.flush()
    os._exit(1)
