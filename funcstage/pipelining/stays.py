"""Which pullbacks wait in host memory: those that an order gives time to go there and to come back."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from funcstage.errors import StructureError
from funcstage.schedules.orders import Action, Order

Offloaded: TypeAlias = Literal["W", "IW"]
"""Whose residuals wait: W's, between I and W, or also what I and W need, between F and I."""

Turn: TypeAlias = tuple[Action, int]
"""An action, and how often it ran before: a W in pieces is there several times."""

EACH_WAY = 3
"""Actions beside which residuals go, and come back, where there is time for so many.

Copies share the bus, and those of a stage of products take about as long as two of its actions.
"""

SHORTEST = 4
"""Actions in between, at least. What waits for fewer costs time, and hardly leaves before it is back."""


class Stays(NamedTuple):
    """What of an order's residuals waits in host memory.

    Attributes:
        after: F's and I's whose pullbacks go.
        before: for turns of a rank, what is fetched as they begin, by what uses it: I's, B's or W's.
        freed: for turns of a rank, the F's and I's whose memory is used again from then on.
    """

    after: frozenset[Action]
    before: Mapping[Turn, Sequence[Action]]
    freed: Mapping[Turn, Sequence[Action]]


NOWHERE = Stays(frozenset(), {}, {})


def check_offload(offloaded: Offloaded | None) -> Offloaded | None:
    """Refuse what is no choice."""
    if offloaded not in (None, "W", "IW"):
        raise StructureError(
            f'offload must be "W" for the residuals of W alone, "IW" for all, or None; got {offloaded!r}.'
        )
    return offloaded


def stays(order: Order, offloaded: Mapping[int, Offloaded]) -> Stays:
    """Find the pullbacks that a rank uses long enough after it has made them.

    Args:
        order: of the pipeline; of a W in pieces, the first piece counts.
        offloaded: by stage, whose residuals wait; none of the others.
    """
    after: set[Action] = set()
    before: defaultdict[Turn, list[Action]] = defaultdict(list)
    freed: defaultdict[Turn, list[Action]] = defaultdict(list)
    for actions in order.ranks:
        turns = in_turns(actions)
        place: dict[Action, int] = {}
        for i, action in enumerate(actions):
            kind = "W" if action.kind == "W" else "I"
            if action.kind == "F" or action in place or kind not in offloaded.get(action.stage, ""):
                place.setdefault(action, i)
                continue
            place[action] = i
            made = action._replace(kind="I" if kind == "W" else "F")
            between = i - place[made] - 1
            if between >= SHORTEST:
                after.add(made)
                freed[turns[place[made] + EACH_WAY]].append(made)
                before[turns[i - min(EACH_WAY, between // 2)]].append(action)
    return Stays(frozenset(after), dict(before), dict(freed))


def stays_everywhere(order: Order, offloaded: Offloaded | None) -> Stays:
    """The same with one choice for all stages.

    Raises:
        StructureError: if that is no choice.
    """
    check_offload(offloaded)
    return stays(order, {} if offloaded is None else dict.fromkeys(range(order.num_stages), offloaded))


def warn_of_nothing(everywhere: Stays, order: Order, offloaded: Offloaded | None, stacklevel: int) -> None:
    """Say so where nothing waits of any stage, though something was to."""
    if offloaded and not everywhere.after:
        more = ', or offload="IW"' if offloaded == "W" else ""
        warnings.warn(
            f'offload="{offloaded}" moves nothing under {order.schedule}: residuals wait in host memory '
            f"where a rank runs {SHORTEST} actions or more in between, and it never does. Leave offload out, "
            f"or take more microbatches{more}.",
            stacklevel=stacklevel + 1,
        )


def in_turns(actions: Sequence[Action]) -> list[Turn]:
    """Tell actions that are there several times apart."""
    times: Counter[Action] = Counter()
    found = []
    for action in actions:
        found.append((action, times[action]))
        times[action] += 1
    return found
