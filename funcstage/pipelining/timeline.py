"""When each action of an order runs, if its costs are these: a simulation of the ranks, in no time.

A pure function from an order and costs to start and end times. Nothing here runs a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from funcstage.pipelining.orders import Action, Order, ScheduleError


class Costs(NamedTuple):
    """What one microbatch costs a stage, in seconds; the whole backward costs `input + weight`."""

    forward: float
    input: float
    weight: float

    def of(self, action: Action) -> float:
        """Return the seconds that an action of the stage takes."""
        backward = {"I": self.input, "W": self.weight, "B": self.input + self.weight}
        return self.forward if action.kind == "F" else backward[action.kind]


class Span(NamedTuple):
    """An action and when it runs, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """An order with times: `ranks[r]` are the spans of rank `r`, in order."""

    order: Order
    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the start of the step until the last rank is done."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """The share of `ranks * makespan` in which a rank had nothing to do; 0 for an empty step."""
        available = len(self.ranks) * self.makespan
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        return 1 - busy / available if available else 0.0


def simulate(order: Order, costs: Sequence[Costs], *, comm: float = 0.0) -> Timeline:
    """Run an order against a clock.

    Every rank starts its next action as soon as it is free and what the action needs has arrived.

    Args:
        order: from `pipeline_order`.
        costs: one for each stage.
        comm: seconds until what one rank has computed is at hand on another. Sending and receiving
            keep no rank from computing. A full backward sends when all of it is done, as torch's does.

    Returns:
        The timeline.

    Raises:
        ScheduleError: if there is not one cost a stage, or one is negative or not finite.

    Example:
        >>> from funcstage.pipelining import pipeline_order
        >>> timeline = simulate(pipeline_order("GPipe", 2, 3), [Costs(1, 1, 1)] * 2)
        >>> timeline.makespan, timeline.bubble_fraction
        (12.0, 0.25)
    """
    _check(order, costs, comm)
    home = order.rank_of_stages()
    done: dict[Action, float] = {}
    free = [0.0] * order.num_ranks
    ranks: list[list[Span]] = [[] for _ in order.ranks]
    for action in order.in_turn():
        rank = home[action.stage]
        arrivals = [
            done[need] + (comm if home[need.stage] != rank else 0.0)
            for need in action.needs(order.num_stages)
        ]
        start = max(free[rank], *arrivals) if arrivals else free[rank]
        end = start + costs[action.stage].of(action)
        done.update(dict.fromkeys(action.gives(), end))
        ranks[rank].append(Span(action, start, end))
        free[rank] = end
    return Timeline(order, tuple(map(tuple, ranks)))


def _check(order: Order, costs: Sequence[Costs], comm: float) -> None:
    if len(costs) != order.num_stages:
        raise ScheduleError(
            f"{order.schedule} has {order.num_stages} stages, but {len(costs)} costs are given."
        )
    for name, seconds in [("comm", (comm,)), *((f"costs[{i}]", cost) for i, cost in enumerate(costs))]:
        if not all(math.isfinite(value) and value >= 0 for value in seconds):
            raise ScheduleError(f"{name} must be finite seconds from 0 up, got {seconds}.")
