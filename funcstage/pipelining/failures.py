"""What one rank fails with, the others raise too, instead of waiting for messages that never come.

A rank that fails writes down why, in the store that all ranks of the process group share, and then breaks off
its connections, so that whoever waits for it wakes up, looks there, and does likewise.

Nothing of this costs anything in a step that goes well. Connections are broken off where they are gloo's; on
a GPU the others wait for at most the group's timeout. After that the messages of the step are under way for
good: no rank runs anything more in the group. A process alone may go on.

The one private name of torch that this stands on is `_get_default_store`.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from funcstage._torch.distributed import default_store
from funcstage._torch.messages import RANK_LOST, says
from funcstage.errors import Failure, StageError, StructureError


def tell(groups: Iterable[dist.ProcessGroup | None], failure: Failure) -> None:
    """Write down why this rank fails, and that it runs nothing more in these groups."""
    for group in set(map(the, groups)):
        if dist.get_world_size(group) > 1:
            _BROKEN[group] = failure
            with suppress(RuntimeError):  # the store's rank has ended, and the others will notice that
                store().set(key(group, "failure"), pickle.dumps(failure))


def heard(groups: Iterable[dist.ProcessGroup | None]) -> Failure | None:
    """Read why a rank of one of the groups has failed, if one said so."""
    with suppress(RuntimeError):  # as above
        for group in set(map(the, groups)):
            told = written(key(group, "failure"))
            if told is not None:
                failure: Failure = pickle.loads(told)
                return failure
    return None


def heard_by_all(failure: Failure) -> StageError:
    """Make the error of a failure that all ranks hear of without being told once more."""
    error = failure.kind(failure.message)
    error.known_to_all = True  # type: ignore[attr-defined]
    return error


_BROKEN: weakref.WeakKeyDictionary[Any, Failure] = weakref.WeakKeyDictionary()
"""The groups in which a step has failed, with messages under way."""


def check_unbroken(group: dist.ProcessGroup | None) -> None:
    """Refuse to go on in a group in which a step has failed.

    Raises:
        StructureError: names that failure.
    """
    failure = _BROKEN.get(the(group))
    if failure is not None:
        text = (
            "A step has failed in this process group, and the next one might take its messages for its own. "
            f"The failure: {failure.message.rstrip('.')}. On every rank, make a new process group "
            "(torch.distributed.new_group), new stages and a new schedule in it, or let the process end."
        )
        raise heard_by_all(Failure(StructureError, text))


def break_off(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Wake all who wait for this rank, or will."""
    for group in set(groups):
        if "gloo" in dist.get_backend(group):
            for peer in others(group):
                # When a wait runs out of time, gloo closes all connections of this rank in the group. With a
                # peer whose connection is closed already there is nothing to wait for: hence all of them.
                with suppress(RuntimeError):
                    work = dist.irecv(torch.empty(1), group_src=peer, group=group, tag=_NEVER_SENT)
                    assert work is not None
                    work.wait(timedelta(milliseconds=1))


_NEVER_SENT = 0x7FFF_0001


def check_connected(group: dist.ProcessGroup | None, rank: int) -> None:
    """Notice that the process of a rank is gone, if the backend knows: gloo says so, whatever it is asked.

    Raises:
        RuntimeError: gloo's own.
    """
    if "gloo" in dist.get_backend(group):
        dist.irecv(torch.empty(1), group_src=rank, group=group, tag=_NEVER_SENT)  # and not waited for


def lost(error: BaseException) -> bool:
    """Whether an error says no more than that another rank does not answer."""
    return isinstance(error, RuntimeError) and says(error, RANK_LOST)


def share(stage: Any, groups: Iterable[dist.ProcessGroup | None], error: BaseException) -> None:
    """Tell the other ranks of an error, or raise what one of them has told.

    Args:
        stage: a stage of this rank.
        groups: the process groups that its messages go through.
        error: what this rank fails with.

    Raises:
        StageError: what another rank has failed with, if that is all that is wrong here.
    """
    if getattr(error, "known_to_all", False):
        return
    groups = list(groups)
    told = heard(groups) if lost(error) else None
    tell(groups, told or Failure.of(f"Stage {stage.stage_index} of {stage.num_stages}", error))
    break_off(groups)
    if told is not None:
        raise told.kind(told.message) from error


# The store.


def the(group: dist.ProcessGroup | None) -> Any:
    """Return the process group that is meant."""
    return group or dist.group.WORLD


def others(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks of a group but this one."""
    return [rank for rank in range(dist.get_world_size(group)) if rank != dist.get_rank(group)]


def key(group: dist.ProcessGroup | None, what: str) -> str:
    """Name a place in the store."""
    return f"funcstage {the(group).group_name}: {what}"


def store() -> Any:
    """Return the store that all ranks share."""
    return default_store()


def written(key: str) -> bytes | None:
    """Read what is at a place in the store, without waiting for it; nothing if it is empty."""
    found: bytes = store().get(key) if store().check([key]) else b""
    return found or None
