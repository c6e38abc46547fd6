"""A greedy order: each rank takes the best action that it may, by one of several policies.

Or the F and I of another order, and only W is placed anew: whole or in pieces, where nothing else can run.
"""

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


PATIENCE = (0.5, 1.0)
"""What `refilled` is tried with."""


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
    return _Greedy(placed, costs, microbatches, limit, comm, policy).order("a greedy search")


def refilled(
    order: Order, costs: Sequence[Costs], limit: float, comm: float, patience: float, pieces: int
) -> Order | None:
    """Place W anew in an order: in the gaps between F and I, and where there is no room for those.

    Args:
        order: whose F and I stay as they are on each rank; a B becomes I and W.
        costs: one for each stage.
        limit: bytes that a rank may hold.
        comm: seconds from one rank to another.
        patience: a rank waits for what arrives within this part of a piece's time rather than run it.
        pieces: in how many W is.

    Returns:
        The order, or `None` if a rank has no room for its next F or I, whatever W it runs before.
    """
    filling = _Filling(order, costs, limit, comm, patience, pieces)
    found = filling.order(order.schedule)
    return found if filling.complete else None


class _Clock:
    """The ranks at a time: what has arrived where, what is held, and when something may happen next.

    What a rank does of all that it may is for a subclass to say.

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
        pieces: int = 1,
    ) -> None:
        self._placed, self._costs, self._microbatches = placed, costs, microbatches
        self._limit, self._comm, self._pieces = limit, comm, pieces
        self._home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
        self._arrived: dict[Action, float] = {}
        self._pending: list[deque[Action]] = [deque() for _ in placed]
        self._next_of: dict[tuple[str, int], int] = {}
        self._held = [0.0] * len(placed)  # in units of `pieces` to a byte
        self.done: list[list[Action]] = [[] for _ in placed]
        self.free = [0.0] * len(placed)
        self.events = [(0.0, rank) for rank in range(len(placed))]

    def order(self, name: str) -> Order:
        """Let the ranks run until nothing is left to do."""
        while self.events:
            now, rank = heapq.heappop(self.events)
            if now < self.free[rank]:
                continue  # another event stands for when it is free
            action, soon = self.choice(now, rank)
            if action is not None:
                self.run(action, now, rank)
            elif soon < float("inf"):
                heapq.heappush(self.events, (soon, rank))
        ranks = tuple(map(tuple, self.done))
        return Order(name, len(self._costs), self._microbatches, ranks, self._pieces)

    def choice(self, now: float, rank: int) -> tuple[Action | None, float]:
        """What a rank does at a time, if anything, and when another F or I arrives that fits."""
        raise NotImplementedError

    def run(self, action: Action, now: float, rank: int) -> None:
        """Let a rank do something, and tell those that wait for it."""
        end = now + self._costs[action.stage].of(action, self._pieces)
        self.done[rank].append(action)
        self.free[rank] = end
        self._held[rank] += self._costs[action.stage].held(action, self._pieces)
        heapq.heappush(self.events, (end, rank))
        if action.kind == "W":
            return
        self._arrived[action] = end
        self._next_of[action.kind, action.stage] = action.microbatch + 1
        if action.kind == "I":
            self._pending[rank].extend([action._replace(kind="W")] * self._pieces)
        neighbour = action.stage + (1 if action.kind == "F" else -1)
        if 0 <= neighbour < len(self._costs) and self._home[neighbour] != rank:
            there = self._home[neighbour]
            heapq.heappush(self.events, (max(end + self._comm, self.free[there]), there))
            heapq.heappush(self.events, (max(end, self.free[there]), there))

    def _arrival(self, action: Action) -> float | None:
        """When what an action needs is at hand, if that is known."""
        at, home = 0.0, self._home[action.stage]
        for need in action.needs(len(self._costs)):
            if need not in self._arrived:
                return None
            at = max(at, self._arrived[need] + self._comm * (self._home[need.stage] != home))
        return at


class _Greedy(_Clock):
    """I and F as they arrive, by a policy, and W in between."""

    def __init__(
        self,
        placed: list[list[int]],
        costs: Sequence[Costs],
        microbatches: int,
        limit: float,
        comm: float,
        policy: _Policy,
    ) -> None:
        super().__init__(placed, costs, microbatches, limit, comm)
        self._policy = policy
        self._ahead = [0] * len(placed)
        self._most = [max(c.held_after_forward, c.held_after_input) for c in costs]

    def choice(self, now: float, rank: int) -> tuple[Action | None, float]:
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
        """Let a rank do something, and count the forwards that its first stage is ahead."""
        super().run(action, now, rank)
        if action.kind != "W" and action.stage == self._placed[rank][0]:
            self._ahead[rank] += 1 if action.kind == "F" else -1

    def _due(self, kind: Any, stage: int) -> tuple[float, Action] | None:
        """The next action of a kind, and when what it needs is at hand, if that is known."""
        action = Action(kind, stage, self._next_of.get((kind, stage), 0))
        at = None if action.microbatch == self._microbatches else self._arrival(action)
        return None if at is None else (at, action)

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


class _Filling(_Clock):
    """F and I in the order that is given, and W in between."""

    def __init__(
        self,
        order: Order,
        costs: Sequence[Costs],
        limit: float,
        comm: float,
        patience: float,
        pieces: int,
    ) -> None:
        placed = [order.stages_of(rank) for rank in range(order.num_ranks)]
        super().__init__(placed, costs, order.num_microbatches, limit, comm, pieces)
        self._patience = patience
        self._rows = [
            deque(action.gives()[0] for action in actions if action.kind != "W") for actions in order.ranks
        ]

    @property
    def complete(self) -> bool:
        """Whether everything was done."""
        return not any(self._rows) and not any(self._pending)

    def choice(self, now: float, rank: int) -> tuple[Action | None, float]:
        """The next F or I if it has arrived and fits, or else W where there is time for it."""
        row, waits, soon = self._rows[rank], self._pending[rank], float("inf")
        if row:
            change = self._costs[row[0].stage].held(row[0], self._pieces)
            at = self._arrival(row[0])
            if at is not None and self._held[rank] + change <= self._limit * self._pieces:
                if at <= now:
                    return row.popleft(), soon
                soon = at
        if waits and soon - now >= self._patience * self._costs[waits[0].stage].weight / self._pieces:
            return waits.popleft(), soon
        return None, soon
