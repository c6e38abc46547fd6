"""The knapsack: which items to take, so that they are worth the most and fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

STEPS = 1 << 15
"""In how many steps of room the best is looked for, where sizes have no larger divisor in common."""


class Item(NamedTuple):
    """Something to take or to leave; sizes are whole numbers, and worth is positive."""

    size: int
    worth: float


def best(items: Sequence[Item], room: int) -> list[int]:
    """Choose what is worth the most; of choices of equal worth one that is as small as any.

    More room yields no less worth and no smaller choice. Sizes that have no divisor in common which divides
    them all in `STEPS` steps are rounded up to a step: what is chosen fits in any case.

    Args:
        items: what there is, alike ones among them.
        room: for all that is taken.

    Returns:
        The indices of what to take, in ascending order.
    """
    if room < 0:
        return []
    table = _table(items, room)
    return table.choice(table.value.index(table.value[-1]))


def choices(items: Sequence[Item]) -> Iterator[list[int]]:
    """What is best for some room or other, from nothing to everything; see `best`."""
    table = _table(items, sum(item.size for item in items))
    for at, value in enumerate(table.value):
        if at == 0 or value > table.value[at - 1]:
            yield table.choice(at)


class _Table(NamedTuple):
    """What fits, by steps of room.

    Attributes:
        value: what can be had with at most so many steps.
        packs: items that are taken together, with their steps.
        taken: for each pack, whether it is part of what is worth so much.
    """

    value: list[float]
    packs: list[tuple[list[int], int]]
    taken: list[bytearray]

    def choice(self, left: int) -> list[int]:
        """What is best with so many steps of room, the least that its worth takes."""
        chosen = []
        for (pack, size), better in zip(reversed(self.packs), reversed(self.taken), strict=True):
            if better[left]:
                chosen += pack
                left -= size
        return sorted(chosen)


def _table(items: Sequence[Item], room: int) -> _Table:
    total = sum(item.size for item in items)
    step = max(math.gcd(*(item.size for item in items)), -(-total // STEPS), 1)
    capacity = min(room, total) // step
    packs = [(pack, len(pack) * -(-items[pack[0]].size // step)) for pack in _packs(items)]
    value = [0.0] * (capacity + 1)
    taken = []
    for pack, size in packs:
        worth = len(pack) * items[pack[0]].worth
        with_it = [without + worth for without in value[: max(capacity + 1 - size, 0)]]
        better = bytearray(capacity + 1)
        for at, candidate in enumerate(with_it, start=size):
            if candidate > value[at]:
                value[at] = candidate
                better[at] = 1
        taken.append(better)
    return _Table(value, packs, taken)


def _packs(items: Sequence[Item]) -> list[list[int]]:
    """Alike items in packs of 1, 2, 4, ... and the rest: any number of them is a sum of packs."""
    alike: dict[Item, list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault(item, []).append(i)
    packs = []
    for indices in alike.values():
        count, at = 1, 0
        while at < len(indices):
            packs.append(indices[at : at + count])
            at, count = at + count, 2 * count
    return packs
