"""Pullbacks whose residuals a `tree_map` has turned into what is no tensor: shapes, names, placements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from funcstage import trees
from funcstage.errors import StructureError


def over(tape: Any, leaves: Sequence[Any]) -> Any:
    """A tape over other residuals, of whatever kind."""
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return tape.with_leaves(leaves)
    return Described(tape, leaves)


class Described:
    """In the place of a tape: what became of its residuals. Given tensors again, it is a tape again."""

    __slots__ = ("_leaves", "_tape")

    def __init__(self, tape: Any, leaves: Sequence[Any]) -> None:
        self._tape = tape
        self._leaves = leaves

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def share(self) -> list[Any]:
        return [*self._leaves]

    def with_leaves(self, leaves: Sequence[Any]) -> Any:
        return self._tape.with_leaves(leaves)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def refusal(self, of: str) -> StructureError:
        (found, *_) = (leaf for leaf in self._leaves if not isinstance(leaf, Tensor))
        return StructureError(
            f"The residuals of this {of} were replaced by what is no tensor, such as "
            f"{trees.describe(found)}. Call the one that tree_map was given, or map these to tensors again."
        )
