"""torch's own pytrees: what is registered there, and the trees that torch's exported programs speak of."""

from __future__ import annotations

from torch.utils._pytree import (
    SUPPORTED_NODES,
    register_pytree_node,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = ["SUPPORTED_NODES", "register_pytree_node", "tree_leaves", "tree_map", "tree_unflatten"]
