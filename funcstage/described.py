"""Pullbacks whose residuals a `tree_map` has made something else of: shapes, another dtype or device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage.errors import StructureError
from funcstage.tensors import with_strides


def over(tape: Any, leaves: Sequence[Any]) -> Any:
    """A tape over other residuals, of whatever kind; kernels read them by the strides that they had."""
    if isinstance(tape, Described):
        kinds, tape = tape.kinds, tape.tape
    else:
        kinds = [*map(trees.describe, tape.leaves())]
    if [*map(trees.describe, leaves)] == kinds:
        return tape.with_leaves([*map(_laid_out, leaves, tape.leaves())])
    return Described(tape.with_leaves([*map(_empty, tape.leaves())]), kinds, leaves)


class Described:
    """In the place of a tape: what became of its residuals. Given what they were again, it is a tape again.

    Attributes:
        tape: it, over what takes no memory.
        kinds: what its residuals were.
    """

    __slots__ = ("_leaves", "kinds", "tape")

    def __init__(self, tape: Any, kinds: Sequence[str], leaves: Sequence[Any]) -> None:
        self.tape = tape
        self.kinds = kinds
        self._leaves = leaves

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def share(self) -> list[Any]:
        return [*self._leaves]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tape, name)

    def refusal(self, of: str) -> StructureError:
        now = map(trees.describe, self._leaves)
        found, was = next((found, was) for found, was in zip(now, self.kinds, strict=True) if found != was)
        return StructureError(
            f"A residual of this {of} was replaced: it is {found}, and was {was}. Call the one that tree_map "
            "was given, or map it to that again."
        )


def _laid_out(leaf: Tensor, like: Tensor) -> Tensor:
    return with_strides(leaf, like.stride()) if _has_strides(like) else leaf


def _has_strides(leaf: Tensor) -> bool:
    return leaf.layout is torch.strided and not leaf.is_nested


def _empty(leaf: Tensor) -> Tensor:
    """A stand-in without memory, laid out alike."""
    if not _has_strides(leaf):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
