"""Which pullbacks wait in host memory: those that an order gives time to go there and to come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from funcstage.errors import StructureError
from funcstage.schedules.orders import Action, Order

Offloaded: TypeAlias = Literal["W", "IW"]
"""Whose residuals wait: W's, between I and W, or also what I and W need, between F and I."""

Turn: TypeAlias = tuple[Action, int]
"""An action, and how often it ran before: a W in pieces is there several times."""

SHORTEST = 2
"""Actions in between, at least: beside the first the residuals go, beside the last they come back."""


class Stays(NamedTuple):
    """What of an order's residuals waits in host memory.

    Attributes:
        after: F's and I's whose pullbacks go.
        before: for turns of a rank, whose pullback is fetched as they begin, as what uses it: an I, B or W.
    """

    after: frozenset[Action]
    before: dict[Turn, Action]


NOWHERE = Stays(frozenset(), {})


def check_offload(offloaded: Offloaded | None) -> Offloaded | None:
    """Refuse what is no choice."""
    if offloaded not in (None, "W", "IW"):
        raise StructureError(
            f'offload must be "W" for the residuals of W alone, "IW" for all, or None; got {offloaded!r}.'
        )
    return offloaded


def stays(order: Order, offloaded: Offloaded | None) -> Stays:
    """Find the pullbacks that a rank uses long enough after it has made them.

    Args:
        order: of the pipeline; of a W in pieces, the first piece counts.
        offloaded: whose residuals wait.

    Raises:
        StructureError: if that is something else.
    """
    check_offload(offloaded)
    after: set[Action] = set()
    before: dict[Turn, Action] = {}
    for actions in order.ranks:
        turns = in_turns(actions)
        place: dict[Action, int] = {}
        for i, action in enumerate(actions):
            kind = "W" if action.kind == "W" else "I"
            if action.kind == "F" or action in place or kind not in (offloaded or ""):
                place.setdefault(action, i)
                continue
            place[action] = i
            made = action._replace(kind="I" if kind == "W" else "F")
            if i - place[made] > SHORTEST:
                after.add(made)
                before[turns[i - 1]] = action
    return Stays(frozenset(after), before)


def in_turns(actions: Sequence[Action]) -> list[Turn]:
    """Tell actions that are there several times apart."""
    times: Counter[Action] = Counter()
    found = []
    for action in actions:
        found.append((action, times[action]))
        times[action] += 1
    return found
