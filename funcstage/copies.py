"""Copies of pullbacks: what `copy`, `deepcopy` and `pickle` make of values that hold autograd's nodes.

A copy has the same residuals and a deep copy has clones of them; both are used apart from the original, and
read the same parameters. Nodes and programs cannot leave the process.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

import optree
from torch import Tensor

from funcstage import trees
from funcstage.errors import StageError


class Unpicklable:
    """Cannot be pickled, nor copied in the way that pickling works."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise StageError(
            f"A {type(self).__name__} cannot be pickled or sent to another process: it holds autograd nodes "
            "and programs of this one. Run the pullback here and pickle the gradients, or call stage_vjp "
            "there."
        )


class CopiedByLeaves(Unpicklable):
    """A pytree whose copies are rebuilt from its leaves."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return _map(lambda leaf: leaf, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return _map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self)


def _map(function: Any, tree: Any) -> Any:
    return optree.tree_map(function, tree, namespace=trees.NAMESPACE)
