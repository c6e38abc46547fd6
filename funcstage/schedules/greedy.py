"""A greedy order: each rank takes the best action that it may, by one of several policies."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from funcstage.schedules.costs import Costs
from funcstage.schedules.orders import (
    Action,
    Order,
)


class _Policy(NamedTuple):
    """Settings of the heuristic.

    Attributes:
        in_flight: forwards a rank may be ahead of its I, in units of the ranks behind it.
        forward_first: whether F goes before I where both could run.
        patience: a rank waits for what arrives within this part of W's time rather than run W.
    """

    in_flight: float
    forward_first: bool
    patience: float


POLICIES = [
    _Policy(*setting)
    for setting in itertools.product((1.0, 2.0, float("inf")), (False, True), (0.0, 0.5, 1.0))
]


def greedy(
    placed: list[list[int]],
    costs: Sequence[Costs],
    microbatches: int,
    limit: float,
    comm: float,
    policy: _Policy,
) -> Order:
    """Fill the ranks in the order of time: I and F as they arrive, W in the gaps and for room.

    F of a rank's first stage leaves room for one microbatch of its second, so that the oldest
    microbatch in flight can always go on.
    """
    clock = _Clock(placed, costs, microbatches, limit, comm, policy)
    while clock.events:
        now, rank = heapq.heappop(clock.events)
        if now < clock.free[rank]:
            continue  # another event stands for when it is free
        action, soon = clock.choice(now, rank)
        if action is not None:
            clock.run(action, now, rank)
        elif soon < float("inf"):
            heapq.heappush(clock.events, (soon, rank))
    return Order("a greedy search", len(costs), microbatches, tuple(map(tuple, clock.done)))


class _Clock:
    """The ranks at a time: what has arrived where, what is held, and when something may happen next.

    Attributes:
        events: times at which a rank may have something to do, a heap.
        done: what each rank has done.
        free: when each rank has done that.
    """

    def __init__(
        self,
        placed: list[list[int]],
        costs: Sequence[Costs],
        microbatches: int,
        limit: float,
        comm: float,
        policy: _Policy,
    ) -> None:
        self._placed, self._costs, self._microbatches = placed, costs, microbatches
        self._limit, self._comm, self._policy = limit, comm, policy
        self._home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
        self._arrived: dict[Action, float] = {}
        self._pending: list[deque[Action]] = [deque() for _ in placed]
        self._next_of: dict[tuple[str, int], int] = {}
        self._held, self._ahead = [0.0] * len(placed), [0] * len(placed)
        self._most = [max(c.held_after_forward, c.held_after_input) for c in costs]
        self.done: list[list[Action]] = [[] for _ in placed]
        self.free = [0.0] * len(placed)
        self.events = [(0.0, rank) for rank in range(len(placed))]

    def choice(self, now: float, rank: int) -> tuple[Action | None, float]:
        """What a rank does at a time, if anything, and when another F or I arrives that fits."""
        stages = self._placed[rank]
        found = [d for kind in ("I", "F") for stage in reversed(stages) if (d := self._due(kind, stage))]
        fits = [(at, action) for at, action in found if self._fits(rank, action)]
        ready = [action for at, action in fits if at <= now]
        soon = min((at for at, _ in fits if at > now), default=float("inf"))
        waits = self._pending[rank]
        if ready:
            return min(ready, key=lambda a: (a.kind == "F") != self._policy.forward_first), soon
        if waits and soon - now >= self._policy.patience * self._costs[waits[0].stage].weight:
            return waits.popleft(), soon
        return None, soon

    def run(self, action: Action, now: float, rank: int) -> None:
        """Let a rank do something, and tell those that wait for it."""
        end = now + self._costs[action.stage].of(action)
        self.done[rank].append(action)
        self.free[rank] = end
        self._held[rank] += self._costs[action.stage].held(action)
        heapq.heappush(self.events, (end, rank))
        if action.kind == "W":
            return
        self._arrived[action] = end
        self._next_of[action.kind, action.stage] = action.microbatch + 1
        if action.kind == "I":
            self._pending[rank].append(action._replace(kind="W"))
        if action.stage == self._placed[rank][0]:
            self._ahead[rank] += 1 if action.kind == "F" else -1
        neighbour = action.stage + (1 if action.kind == "F" else -1)
        if 0 <= neighbour < len(self._costs) and self._home[neighbour] != rank:
            there = self._home[neighbour]
            heapq.heappush(self.events, (max(end + self._comm, self.free[there]), there))
            heapq.heappush(self.events, (max(end, self.free[there]), there))

    def _due(self, kind: Any, stage: int) -> tuple[float, Action] | None:
        """The next action of a kind, and when what it needs is at hand, if that is known."""
        action = Action(kind, stage, self._next_of.get((kind, stage), 0))
        if action.microbatch == self._microbatches:
            return None
        at = 0.0
        for need in action.needs(len(self._costs)):
            if need not in self._arrived:
                return None
            at = max(at, self._arrived[need] + self._comm * (self._home[need.stage] != self._home[stage]))
        return at, action

    def _fits(self, rank: int, action: Action) -> bool:
        """Tell whether there is room for an action, in memory and among the forwards in flight."""
        stages, costs, held = self._placed[rank], self._costs, self._held[rank]
        if action.kind == "I":
            return held + costs[action.stage].held(action) <= self._limit
        later = stages[stages.index(action.stage) + 1 :]
        most = self._most
        needed = max(
            most[action.stage], *(costs[action.stage].held_after_forward + most[s] for s in later), 0
        )
        behind = len(self._placed) - rank if len(stages) == 1 else 2 * len(self._placed) - rank
        first, ahead = action.stage == stages[0], self._ahead[rank]
        return held + needed <= self._limit and (
            not first or ahead == 0 or ahead < self._policy.in_flight * behind
        )
