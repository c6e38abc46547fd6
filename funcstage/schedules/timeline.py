"""When each action of an order runs, and what is held, if its costs are these: a simulation of the ranks.

A pure function from an order and costs to start and end times, linear in the number of actions. Nothing
here runs a stage.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from funcstage.report import frame, size, table
from funcstage.schedules.costs import Costs
from funcstage.schedules.orders import Action, Order, ScheduleError


class Span(NamedTuple):
    """An action and when it runs, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True, repr=False)
class Timeline:
    """An order with times.

    Attributes:
        order: what was simulated.
        costs: of each stage.
        comm: seconds from one rank to another.
        starts: seconds from the start of the step; `starts[r][i]` is that of `order.ranks[r][i]`.
        ends: likewise.
    """

    order: Order
    costs: tuple[Costs, ...]
    comm: float
    starts: tuple[array[float], ...]
    ends: tuple[array[float], ...]

    @property
    def ranks(self) -> tuple[tuple[Span, ...], ...]:
        """The spans of each rank, in order."""
        columns = zip(self.order.ranks, self.starts, self.ends, strict=True)
        return tuple(tuple(map(Span, *column)) for column in columns)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the step until the last rank is done."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def busy(self) -> float:
        """Seconds of computation, summed over the ranks: how long the step takes in one process."""
        return sum(sum(ends) - sum(starts) for starts, ends in zip(self.starts, self.ends, strict=True))

    @property
    def bubble_fraction(self) -> float:
        """The share of `ranks * makespan` in which a rank had nothing to do; 0 for an empty step."""
        available = len(self.ends) * self.makespan
        return 1 - self.busy / available if available else 0.0

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the ranks, its header first."""
        rows: list[tuple[str, ...]] = [("rank", "stages", "busy", "idle", "peak")]
        for rank, (starts, ends, peak) in enumerate(
            zip(self.starts, self.ends, self.peak_memory, strict=True)
        ):
            busy = sum(ends) - sum(starts)
            stages = ", ".join(map(str, self.order.stages_of(rank)))
            idle = 1 - busy / self.makespan if self.makespan else 0.0
            rows.append((str(rank), stages, f"{busy:,.4g} s", f"{idle:.1%}", size(peak)))
        return rows

    def __repr__(self) -> str:
        return f"<Timeline {self}, on {len(self.ends)} ranks>"

    def __str__(self) -> str:
        return (
            f"{self.order.schedule}: {self.makespan:,.4g} s for {self.order.num_microbatches} microbatches, "
            f"bubble {self.bubble_fraction:.1%}"
        )

    def _repr_html_(self) -> str:
        header, *rows = self.rows()
        return table(str(self), header, rows)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each action: where it ran, what it was, and when.

        Raises:
            StageError: if pandas is not installed.
        """
        rows = [
            (rank, action.stage, action.kind, action.microbatch, start, end)
            for rank, spans in enumerate(self.ranks)
            for action, start, end in spans
        ]
        return frame(("rank", "stage", "kind", "microbatch", "start", "end"), rows)

    def critical_path(self) -> list[Span]:
        """Return the actions that determine the length of the step, in order.

        Each starts when the one before it is done, or has arrived from the other rank.
        """
        where = {
            done: (rank, i)
            for rank, actions in enumerate(self.order.ranks)
            for i, action in enumerate(actions)
            for done in action.gives()
        }
        rank = max((r for r in range(len(self.ends)) if self.ends[r]), key=lambda r: self.ends[r][-1])
        place: tuple[int, int] | None = (rank, len(self.ends[rank]) - 1)
        path = []
        while place is not None:
            rank, i = place
            action, start = self.order.ranks[rank][i], self.starts[rank][i]
            path.append(Span(action, start, self.ends[rank][i]))
            before = [(rank, i - 1)] if i else []
            before += [where[need] for need in action.needs(self.order.num_stages)]
            place = next(
                (b for b in before if self.ends[b[0]][b[1]] + self.comm * (b[0] != rank) == start), None
            )
        return path[::-1]

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """Return the bytes of residuals that a rank holds over time.

        Args:
            rank: whose.

        Returns:
            Pairs of seconds and the bytes held from then on. What an action adds counts from its start,
            what it frees until its end.
        """
        held: float = 0
        pieces = self.order.pieces
        curve = [(0.0, held)]
        columns = zip(self.order.ranks[rank], self.starts[rank], self.ends[rank], strict=True)
        for action, start, end in columns:
            change = self.costs[action.stage].held(action, pieces)
            held += change
            curve.append((start if change > 0 else end, held if pieces == 1 else held / pieces))
        return curve

    @property
    def peak_memory(self) -> list[float]:
        """The most bytes of residuals that each rank holds at a time."""
        return peak_memory(self.order, self.costs)


def peak_memory(order: Order, costs: Sequence[Costs]) -> list[float]:
    """Return the most bytes of residuals that each rank of an order holds at a time.

    Args:
        order: the order; when its actions run does not matter.
        costs: one for each stage.
    """

    def held(actions: Sequence[Action]) -> Iterator[float]:
        return itertools.accumulate((costs[a.stage].held(a, pieces) for a in actions), initial=0)

    pieces = order.pieces
    peaks = [max(held(actions)) for actions in order.ranks]
    return peaks if pieces == 1 else [peak / pieces for peak in peaks]


def simulate(order: Order, costs: Sequence[Costs], *, comm: float = 0.0) -> Timeline:
    """Run an order against a clock.

    Every rank starts its next action as soon as it is free and what the action needs has arrived.

    Args:
        order: from `pipeline_order`, `read_order` or `find_schedule`.
        costs: one for each stage.
        comm: seconds until what one rank has computed is available on another. Ranks compute while they
            send and receive. A whole backward sends when all of it is done, as torch's does.

    Returns:
        The timeline.

    Raises:
        ScheduleError: if there is not one cost a stage, one is negative or not finite, or the ranks of
            the order wait for each other.

    Example:
        >>> from funcstage.pipelining import pipeline_order
        >>> timeline = simulate(pipeline_order("GPipe", 2, 3), [Costs(1, 1, 1)] * 2)
        >>> timeline.makespan, timeline.bubble_fraction
        (12.0, 0.25)
    """
    _check(order, costs, comm)
    stages, microbatches = order.num_stages, order.num_microbatches
    home = order.rank_of_stages()
    # Ends of F and of I by stage * microbatches + microbatch; -1 where it is not done.
    forward, backward = ([-1.0] * (stages * microbatches) for _ in range(2))
    waiting: dict[tuple[bool, int], list[int]] = {}
    starts, ends = ([array("d") for _ in order.ranks] for _ in range(2))
    free = [0.0] * order.num_ranks
    ready = list(range(order.num_ranks))
    while ready:
        rank = ready.pop()
        actions, clock = order.ranks[rank], free[rank]
        for i in range(len(ends[rank]), len(actions)):
            kind, stage, microbatch = actions[i]
            key = stage * microbatches + microbatch
            needs = _needs(kind, stage, microbatch, key, stages, microbatches)
            start = clock
            for of_backward, need in needs:
                end = (backward if of_backward else forward)[need]
                if end < 0:
                    waiting.setdefault((of_backward, need), []).append(rank)
                    break
                if home[need // microbatches] != rank:
                    end += comm
                start = max(start, end)
            else:
                clock = start + costs[stage].of(actions[i], order.pieces)
                starts[rank].append(start)
                ends[rank].append(clock)
                if kind != "W":
                    (forward if kind == "F" else backward)[key] = clock
                    ready += waiting.pop((kind != "F", key), ())
                continue
            break
        free[rank] = clock
    stuck = [str(a[len(e)]) for a, e in zip(order.ranks, ends, strict=True) if len(e) < len(a)]
    if stuck:
        raise ScheduleError(
            f"{order.schedule} with {stages} stages and {microbatches} microbatches deadlocks; waiting: "
            f"{', '.join(stuck[:8])}{', ...' if len(stuck) > 8 else ''}. No rank's order may contradict "
            "another's."
        )
    return Timeline(order, tuple(costs), comm, tuple(starts), tuple(ends))


def _needs(
    kind: str, stage: int, microbatch: int, key: int, stages: int, microbatches: int
) -> Sequence[tuple[bool, int]]:
    """What `Action.needs` says, as (whether of I, key): a few times faster, for millions of actions."""
    if kind == "W":
        return ((True, key),)
    if kind == "F":
        if stage == 0:
            return ((False, key - 1),) if microbatch else ()
        upstream = (False, key - microbatches)
        return (upstream, (False, key - 1)) if microbatch else (upstream,)
    if stage == stages - 1:
        return ((False, key),)
    return ((False, key), (True, key + microbatches))


def _check(order: Order, costs: Sequence[Costs], comm: float) -> None:
    if not isinstance(order, Order):
        way_out = f"pipeline_order({order!r}, num_stages, num_microbatches)" if isinstance(order, str) else ""
        raise ScheduleError(
            f"simulate takes an Order, got {type(order).__name__}. "
            f"Make one with {way_out or 'pipeline_order, read_order or find_schedule'}."
        )
    if not isinstance(costs, Sequence) or not all(isinstance(cost, Costs) for cost in costs):
        raise ScheduleError(
            f"costs must be a list with the Costs of each of the {order.num_stages} stages, such as "
            f"[Costs(forward=1, input=1, weight=1)] * {order.num_stages}; got {costs!r}."
        )
    if len(costs) != order.num_stages:
        raise ScheduleError(
            f"{order.schedule} has {order.num_stages} stages, but {len(costs)} costs are given. Pass one for "
            "each stage."
        )
    for name, values in [("comm", (comm,)), *((f"costs[{i}]", cost) for i, cost in enumerate(costs))]:
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ScheduleError(f"{name} must be finite seconds (and bytes) from 0 up, got {values}.")
