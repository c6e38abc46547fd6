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


class Knapsack:
    """What is worth the most within any room.

    Sizes that have no divisor in common which divides them all in `STEPS` steps are rounded up to a step:
    what is chosen fits in any case.

    Args:
        items: what there is, alike ones among them.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self._total = sum(item.size for item in items)
        self._step = max(math.gcd(*(item.size for item in items)), -(-self._total // STEPS), 1)
        self._packs = [(pack, len(pack) * -(-items[pack[0]].size // self._step)) for pack in _packs(items)]
        # By steps of room: what can be had with at most so many, and whether a pack is part of it.
        self._value = value = [0.0] * (self._total // self._step + 1)
        self._taken: list[bytearray] = []
        for pack, size in self._packs:
            worth = len(pack) * items[pack[0]].worth
            with_it = [without + worth for without in value[: max(len(value) - size, 0)]]
            better = bytearray(len(value))
            for at, candidate in enumerate(with_it, start=size):
                if candidate > value[at]:
                    value[at] = candidate
                    better[at] = 1
            self._taken.append(better)

    def best(self, room: int) -> list[int]:
        """Choose what is worth the most; of choices of equal worth one that is as small as any.

        More room yields no less worth and no smaller choice.

        Args:
            room: for all that is taken.

        Returns:
            The indices of what to take, in ascending order.
        """
        if room < 0:
            return []
        return self._choice(self._value.index(self._value[min(room, self._total) // self._step]))

    def choices(self) -> Iterator[list[int]]:
        """What is best for some room or other, from nothing to everything."""
        for at, value in enumerate(self._value):
            if at == 0 or value > self._value[at - 1]:
                yield self._choice(at)

    def _choice(self, left: int) -> list[int]:
        """What is best with so many steps of room, the least that its worth takes."""
        chosen = []
        for (pack, size), better in zip(reversed(self._packs), reversed(self._taken), strict=True):
            if better[left]:
                chosen += pack
                left -= size
        return sorted(chosen)


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
