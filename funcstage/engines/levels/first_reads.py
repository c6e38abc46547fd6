"""First reads: where data first meets parameters in a stage of which no argument is differentiated.

There W is the whole backward, on one tape. What lies between these and the output are activations, as if
they had come from a stage before: that tells the operations apart which read parameters next to one of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from funcstage.residuals import nodes_between


class FirstReads:
    """Follows what is computed from the arguments alone through a forward pass, up to where parameters join.

    What it misses makes sites larger, and nothing wrong: it says where to divide, not what to compute.

    Args:
        arguments: leaves of the arguments.

    Attributes:
        edges: results that depend on both. Those among them that lead to others are no first reads: an
            activation times a mask, say.
    """

    def __init__(self, arguments: Iterable[Any]) -> None:
        # Those that require grad are data, too: where the stage computes with one, it is refused in the end.
        given = [argument for argument in arguments if isinstance(argument, Tensor)]
        self._data = {id(tensor): weakref.ref(tensor) for tensor in given}
        self.edges: dict[GradientEdge, None] = {}

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take note of what an operation has returned, or written."""
        if self._reads_data(args) or (kwargs and self._reads_data(kwargs.values())):
            self._mark(result if isinstance(result, (tuple, list)) else (result,))

    def _mark(self, results: Iterable[Any]) -> None:
        for tensor in results:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.requires_grad:
                self.edges[get_gradient_edge(tensor)] = None
            else:
                self._data[id(tensor)] = weakref.ref(tensor)

    def _reads_data(self, operands: Iterable[Any]) -> bool:
        for operand in operands:
            reference = self._data.get(id(operand))
            if reference is not None and reference() is operand:
                return True
            if isinstance(operand, (list, tuple)) and self._reads_data(operand):
                return True
        return False


def first_among(edges: Iterable[GradientEdge], tape: Container[Node]) -> list[GradientEdge]:
    """The first reads among these edges.

    Args:
        edges: of `FirstReads`.
        tape: its nodes. A write into a view replaces some that were on it before.
    """
    edges = [edge for edge in edges if edge.node in tape]
    leading = nodes_between(edges, {edge.node for edge in edges})
    return [e for e in edges if not any(after in leading for after, _ in e.node.next_functions)]
