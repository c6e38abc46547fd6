"""DTensors, found without importing what they are made by, which takes a second."""

from __future__ import annotations

import sys

from funcstage import trees
from funcstage.trees import PyTree


def first_dtensor(tree: PyTree) -> int | None:
    """The number of the first leaf of a tree that is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return None
    leaves = enumerate(trees.flatten(tree)[0])
    return next((i for i, leaf in leaves if isinstance(leaf, module.DTensor)), None)
