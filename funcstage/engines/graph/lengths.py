"""Which sizes of a compiled stage's arguments are left open: all, none, or those that were seen to vary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import optree
from torch import Tensor

from funcstage.dtensors import Specs
from funcstage.engines.graph.guards import Signature, varied
from funcstage.engines.graph.sizes import Open


class Lengths:
    """What a compiled stage has seen of sizes that vary.

    Args:
        dynamic: as for `compile`.
    """

    def __init__(self, dynamic: bool | None) -> None:
        self.dynamic = dynamic
        self._seen: dict[optree.PyTreeSpec, dict[int, set[int]]] = {}
        self._closed: set[optree.PyTreeSpec] = set()

    def open_in(self, leaves: Sequence[Any], structure: optree.PyTreeSpec, specs: Specs) -> Open:
        """The dimensions that a trace of this call leaves open, by the place of the leaf.

        None where there are DTensors, whose sharding depends on sizes.
        """
        if specs or structure in self._closed or not (self.dynamic or structure in self._seen):
            return {}
        first = n_state_of(structure)
        seen = self._seen.get(structure, {})
        found = {}
        for i in range(first, len(leaves)) if self.dynamic else sorted(seen):
            if isinstance(leaf := leaves[i], Tensor):
                dims = range(leaf.dim()) if self.dynamic else sorted(seen[i])
                found[i] = tuple(dim for dim in dims if leaf.shape[dim] > 1)
        return {i: dims for i, dims in found.items() if dims}

    def learn(self, traced: Iterable[Signature], called: Signature) -> bool:
        """Note in which sizes a call differs from what was traced; tell whether that is news."""
        if self.dynamic is not None or called.structure in self._closed:
            return False
        for signature in traced:
            found = varied(signature, called, n_state_of(called.structure))
            if found:
                seen = self._seen.setdefault(called.structure, {})
                for i, dims in found.items():
                    seen.setdefault(i, set()).update(dims)
                return True
        return False

    def close(self, structure: optree.PyTreeSpec) -> None:
        """Leave nothing open from now on, as that cannot be traced."""
        self._closed.add(structure)


def n_state_of(structure: optree.PyTreeSpec) -> int:
    """How many leaves of (params, buffers, args, kwargs) are parameters and buffers."""
    params, buffers, *_ = structure.children()
    return params.num_leaves + buffers.num_leaves
