"""Microbatches: the tensors of a batch, cut along dimension 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from funcstage import trees
from funcstage._torch.block_masks import is_block_mask, split
from funcstage.errors import LeafError
from funcstage.trees import PyTree, describe


def microbatches(root: str, batch: PyTree, count: int) -> list[PyTree]:
    """Cut the tensors of a batch along dimension 0 into equal views; all else goes to each microbatch.

    FlexAttention's masks are cut as torch's pipelines cut them.
    """
    leaves, spec = trees.flatten_down_to(_is_mask, batch)
    columns: list[Sequence[Any]] = []
    for i, leaf in enumerate(leaves):
        if _is_mask(leaf):
            columns.append(split(leaf, count))
        elif not isinstance(leaf, Tensor):
            columns.append([leaf] * count)
        elif leaf.dim() and leaf.shape[0] % count == 0:
            columns.append(leaf.unflatten(0, (count, leaf.shape[0] // count)).unbind(0))
        else:
            name = trees.leaf_names(spec, root)[i]
            size = f"{leaf.shape[0]} along dimension 0" if leaf.dim() else "no dimension"
            raise LeafError(
                f"{name} must be cut along dimension 0 into {count} equal microbatches, but has {size} "
                f"({describe(leaf)}). Drop or pad samples, choose a divisor as the number of microbatches, "
                "or make what is the same for all samples a constant of the stage."
            )
    return [trees.unflatten(spec, row) for row in zip(*columns, strict=True)] if leaves else [batch] * count


def _is_mask(value: object) -> bool:
    return is_block_mask(type(value))
