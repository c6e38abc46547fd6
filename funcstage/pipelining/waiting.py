"""Pullbacks of a rank on their way to the host's memory and back, as its actions come and go."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeAlias

from funcstage._torch.pipelining import ExchangingStage
from funcstage._torch.schedules import stages_of, trains
from funcstage.away import Sent
from funcstage.errors import StructureError
from funcstage.offloading import leave, prefetch
from funcstage.pipelining.over_order import order_of
from funcstage.pipelining.stays import NOWHERE, Stays, stays, stays_everywhere, warn_of_nothing
from funcstage.schedules.orders import Action

Place: TypeAlias = Callable[[Action], Any]
"""The pullback that an action has left behind; None if it is not there (any more)."""

Put: TypeAlias = Callable[[Action, Any], None]
"""Puts another in its place."""


class Waiting:
    """Sends away what waits long enough, and fetches it some actions before its use.

    Args:
        stays: what waits.
        get: finds a pullback.
        put: replaces it.
    """

    def __init__(self, stays: Stays, get: Place, put: Put) -> None:
        self._stays, self._get, self._put = stays, get, put
        self._sent: dict[Action, Sent] = {}
        self._times: Counter[Action] = Counter()

    @classmethod
    def for_nothing(cls) -> Self:
        """Where nothing waits."""
        return cls(NOWHERE, _nothing, _nothing)

    def begin(self, action: Action) -> None:
        """An action begins: what was sent some actions ago is free by what it launches."""
        turn = action, self._times[action]
        self._times[action] += 1
        for made in self._stays.freed.get(turn, ()):
            sent = self._sent.pop(made, None)
            if sent is not None:
                sent.free_in_turn()
        for user in self._stays.before.get(turn, ()):
            pullback = self._get(user._replace(kind="I" if user.kind == "W" else "F"))
            if pullback is not None:  # rather than its pieces, the first of which has brought all back
                prefetch(pullback)

    def made(self, action: Action) -> None:
        """An F or I has left its pullback behind."""
        if action not in self._stays.after:
            return
        pullback, sent = leave(self._get(action))
        self._put(action, pullback)
        if sent is not None:
            self._sent[action] = sent

    def clear(self) -> None:
        """Begin a step."""
        for sent in self._sent.values():  # of one that failed
            sent.free_when_done()
        self._sent.clear()
        self._times.clear()


_UNDER: weakref.WeakKeyDictionary[Any, Waiting] = weakref.WeakKeyDictionary()


def waiting_under(schedule: Any, rank: int) -> Waiting:
    """What waits of the stages that a schedule has on a rank, which share it, as a step begins.

    Raises:
        StructureError: if a stage is to offload, and the schedule has no table to do it by.
    """
    if not trains(schedule):
        return Waiting.for_nothing()
    if schedule not in _UNDER:
        own = {s.stage_index: s for s in stages_of(schedule) if isinstance(s, ExchangingStage)}
        _UNDER[schedule] = _waiting(schedule, rank, own)
    _UNDER[schedule].clear()
    return _UNDER[schedule]


def _waiting(schedule: Any, rank: int, own: dict[int, Any]) -> Waiting:
    away = {i: stage.offload for i, stage in own.items() if stage.offload is not None}
    if not away:
        return Waiting.for_nothing()
    order = order_of(schedule, rank)
    if order is None:
        raise StructureError(
            f"offload={next(iter(away.values()))!r} goes by the order of the schedule, and "
            f"{type(schedule).__name__} has none that can be read (pipeline_order). Leave offload out, or "
            "make the schedule by torch_schedule."
        )
    for offloaded in dict.fromkeys(away.values()):
        warn_of_nothing(stays_everywhere(order, offloaded), order, offloaded, stacklevel=3)

    def get(made: Action) -> Any:
        if made.kind == "I":
            return own[made.stage]._weight_pullbacks.get(made.microbatch)
        forward = own[made.stage]._forwards.get(made.microbatch)
        return None if forward is None else forward.pullback

    def put(made: Action, pullback: Any) -> None:
        if made.kind == "I":
            own[made.stage]._weight_pullbacks[made.microbatch] = pullback
        else:
            forwards = own[made.stage]._forwards
            forwards[made.microbatch] = replace(forwards[made.microbatch], pullback=pullback)

    return Waiting(stays(order, away), get, put)


def _nothing(*about: Any) -> None:
    """What is got, or put, where nothing waits; a stage that holds it can be pickled."""
