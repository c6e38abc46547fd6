"""What process groups do not tell publicly: the store that all ranks share, timeouts, and when they end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import distributed_c10d

__all__ = ["before_shutdown", "default_store", "timeout_of"]

default_store: Callable[[], Any] = distributed_c10d._get_default_store


def timeout_of(group: Any, device: torch.device) -> float:
    """How many seconds the messages of a group may take."""
    try:
        found: Any = group or distributed_c10d.GroupMember.WORLD
        backend = found._get_backend(device)
        return float(backend.options._timeout.total_seconds())
    except (AttributeError, RuntimeError):  # backends without options
        return float(distributed_c10d.default_pg_timeout.total_seconds())


class _Closing:
    """Calls what is to happen before the default group ends; it finalizes all of its communicators first."""

    def __init__(self) -> None:
        self.waiting: list[weakref.WeakMethod[Any]] = []

    def finalize(self) -> None:
        """Call everything."""
        waiting, self.waiting = self.waiting, []
        for reference in waiting:
            method = reference()
            if method is not None:
                method()


def before_shutdown(method: Callable[[], object]) -> None:
    """Call a method before `destroy_process_group()` ends the default group, if its object lives then."""
    comms = distributed_c10d._world.comms
    closing = next((each for each in comms if isinstance(each, _Closing)), None)
    if closing is None:
        closing = _Closing()
        comms.append(closing)
    closing.waiting = [each for each in closing.waiting if each() is not None]
    closing.waiting.append(weakref.WeakMethod(method))
