"""A rank that fails before its first step is noticed by the others before theirs, whatever the backend.

In the store that all ranks share, each rank keeps which of its stages could not be constructed, from its
first constructor on. Whoever begins with a schedule waits there for the plans of the others, not in a
message: so a failure is heard at once, no connection breaks, and all may try again in the same group.

A rank that has none of our stages says nothing. Nor does one that is not there yet: after some patience the
others go on to their messages, having said so (`waiting`). A constructor that fails after that breaks off the
connections, as a step that fails does.
"""

from __future__ import annotations

import pickle
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from funcstage.errors import StageError
from funcstage.pipelining import failures

_FAILED: weakref.WeakKeyDictionary[Any, dict[int, tuple[str, failures.Failure]]] = weakref.WeakKeyDictionary()
"""By group, the stages of this rank that could not be constructed."""

_RAISED: set[str] = set()
"""The failures of other ranks that were raised here; each is raised once."""

_PRESENT_SECONDS = {"gloo": 30.0}
_ABSENT_SECONDS = {"gloo": 0.0}
"""How long to wait for ranks that have our stages, and for those of which nothing is known.

Of gloo's messages, a wait can be broken off. Other backends' waits last until the group's timeout, so there
all of the waiting is done here."""


@contextmanager
def constructing(group: dist.ProcessGroup | None, stage_index: int, num_stages: int) -> Iterator[None]:
    """Let the other ranks know if a constructor fails."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank(group) < 0:
        yield
        return
    if dist.get_world_size(group) == 1:
        yield
        return
    failed = _FAILED.get(failures.the(group))
    if failed is None:
        failed = _FAILED[failures.the(group)] = {}
        _publish(group)
    try:
        yield
    except BaseException as error:
        rank = dist.get_rank(group)
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        failure = failures.Failure(
            type(error) if isinstance(error, StageError) else StageError,
            f"Rank {rank} of the pipeline could not construct stage {stage_index} of {num_stages}: {text}",
        )
        failed[stage_index] = uuid.uuid4().hex, failure
        _publish(group)
        others = [failures.key(group, f"waiting {other}") for other in failures.others(group)]
        if any(failures.store().check([key]) for key in others):
            failures.tell([group], failure)
            failures.break_off([group])
        raise
    if failed.pop(stage_index, None) is not None:
        _publish(group)


def wait_for_plans(group: dist.ProcessGroup | None, plan_key: Callable[[int], str]) -> None:
    """Wait until the other ranks have written down their plans, or one says why it cannot.

    Args:
        group: of the pipeline.
        plan_key: where in the store the plan of a rank is.

    Raises:
        StageError: what another rank has failed with.
    """
    backend = str(dist.get_backend(group))
    until_present = time.monotonic() + _PRESENT_SECONDS.get(backend, 600.0)
    until_absent = time.monotonic() + _ABSENT_SECONDS.get(backend, 10.0)
    pause = 0.001
    while True:
        waiting = False
        for rank in failures.others(group):
            if failures.written(plan_key(rank)):
                continue
            present = _raise_failure(group, rank)
            waiting |= time.monotonic() < (until_present if present else until_absent)
        if not waiting:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    missing = [rank for rank in failures.others(group) if not failures.written(plan_key(rank))]
    if missing:
        failures.store().set(failures.key(group, f"waiting {dist.get_rank(group)}"), b"1")
        for rank in missing:  # one that failed before it could read that does not wake us
            _raise_failure(group, rank)


def _raise_failure(group: dist.ProcessGroup | None, rank: int) -> bool:
    """Raise what a rank has failed with; return whether it has our stages."""
    value = failures.written(failures.key(group, f"constructors of {rank}"))
    if not value:
        return False
    for serial, failure in pickle.loads(value).values():
        if serial not in _RAISED:
            _RAISED.add(serial)
            raise failures.heard_by_all(failure)
    return True


def _publish(group: dist.ProcessGroup | None) -> None:
    key = failures.key(group, f"constructors of {dist.get_rank(group)}")
    failures.store().set(key, pickle.dumps(_FAILED[failures.the(group)]))
