"""W's that run in pieces: which have begun, and which piece of each is next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from funcstage.pipelining.ranges import leaves_behind
from funcstage.weight_pullback import WeightPullback


class Piece(NamedTuple):
    """A piece of a W.

    Attributes:
        number: from 1.
        of: how many there are.
        pullback: what it computes; nothing where a stage could not be divided in so many.
    """

    number: int
    of: int
    pullback: WeightPullback | None

    @property
    def is_last(self) -> bool:
        """Whether the W is done with it."""
        return self.number == self.of

    def __str__(self) -> str:
        return f", piece {self.number} of {self.of}" if self.of > 1 else ""


class Pieces:
    """The W's of a step, of which the first piece to come divides the whole.

    Args:
        count: in how many pieces each W is.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._left: dict[Hashable, list[WeightPullback | None]] = {}

    def named(self, key: Hashable) -> str:
        """What the next piece of a W is called in a trace."""
        return str(self._numbered(key))

    def next(self, key: Hashable, whole: Callable[[], WeightPullback]) -> Piece:
        """Take the next piece of a W, whose whole is asked for where none was taken before."""
        piece = self._numbered(key)
        if self.count == 1:
            return piece._replace(pullback=whole())
        if key not in self._left:
            divided = whole().split(self.count)
            self._left[key] = [*divided, *[None] * (self.count - len(divided))]
        pullback, *rest = self._left.pop(key)
        if rest:
            self._left[key] = rest
            leaves_behind(*(left for left in rest if left is not None))
        return piece._replace(pullback=pullback)

    def _numbered(self, key: Hashable) -> Piece:
        left = len(self._left[key]) if key in self._left else self.count
        return Piece(self.count + 1 - left, self.count, None)

    def begun(self, key: Hashable) -> bool:
        """Whether pieces of a W are left."""
        return key in self._left

    def clear(self) -> None:
        """Begin a step."""
        self._left.clear()
