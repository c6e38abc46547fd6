"""Sizes that a trace leaves open, so that its programs serve calls of any length.

Each open dimension is a symbol of its own. What the stage assumes of it (that it equals another one, that it
is a multiple of something) is noted while the stage is traced and checked for every call. Sizes 0 and 1 are
never open: they broadcast, which other sizes do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from funcstage._torch import shapes
from funcstage._torch.shapes import is_number

Open: TypeAlias = Mapping[int, tuple[int, ...]]
"""Which dimensions of which tensors are open, by the place of the tensor."""


class Sizes:
    """The open sizes of a trace.

    Args:
        tensors: those of a call, in order.
        open_dims: which of their dimensions are open.

    Attributes:
        symbols: the sizes.
        n_traced: how much was assumed of them when the programs were made, before a backend lowered any.
    """

    def __init__(self, tensors: Sequence[Tensor], open_dims: Open) -> None:
        self.env = shapes.environment()
        self._open = open_dims
        self._places = [(i, dim) for i, dims in sorted(open_dims.items()) for dim in dims]
        self.symbols: list[SymInt] = [
            shapes.symbol(self.env, tensors[i].shape[dim], f"tensor {i}, dimension {dim}")
            for i, dim in self._places
        ]
        self.n_traced = 0
        self._checks: dict[int, Callable[..., tuple[Any, ...]]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def geometry(self, i: int, tensor: Tensor) -> tuple[Sequence[Any], Sequence[Any]]:
        """The shape and strides of a tensor, symbolic where they are open."""
        if i not in self._open:
            return tensor.shape, tensor.stride()
        numbers = dict(zip(self._places, self.symbols, strict=True))
        shape = [numbers.get((i, dim), size) for dim, size in enumerate(tensor.shape)]
        strides: list[Any] = list(tensor.stride())
        rule = strides_of(tensor)
        for dim in sorted(range(tensor.dim()), key=lambda dim: _nesting(tensor, dim)):
            inner = rule[dim]
            if isinstance(inner, Inside):
                strides[dim] = strides[inner.dim] * shape[inner.dim]
        return shape, strides

    def placeholders(self, graph: Graph, anchor: Node | None = None) -> list[Node]:
        """Add placeholders for the sizes to a graph, before one of its nodes or last."""
        made = []
        with graph.inserting_before(anchor):
            for i, symbol in enumerate(self.symbols):
                node = graph.placeholder(f"size_{i}")
                node.meta["val"] = symbol
                made.append(node)
        return made

    def computed(self, graph: Graph, placeholders: Sequence[Node], values: Sequence[Any]) -> list[Any]:
        """Compute numbers at the end of a graph, where they are symbolic."""
        return [shapes.computed(graph._root, value, self.symbols, placeholders) for value in values]

    def of(self, tensors: Sequence[Tensor]) -> list[int]:
        """The open sizes of a call's tensors."""
        return [tensors[i].shape[dim] for i, dim in self._places]

    def among(self, state: Sequence[Any]) -> Sequence[int]:
        """The sizes among parameters, buffers and sizes, of which they are the last."""
        return state[len(state) - len(self) :]

    def n_guards(self) -> int:
        """How much was assumed of them so far."""
        return len(self.env.guards)

    def hold(self, sizes: Sequence[int], n_guards: int) -> bool:
        """Tell whether sizes are as the first `n_guards` assumptions have them."""
        if n_guards not in self._checks:
            assumed = shapes.guards(self.env)[:n_guards]
            self._checks[n_guards] = shapes.function_of(self.symbols, assumed)
        return min(sizes) > 1 and all(self._checks[n_guards](*sizes))

    def admit(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether the programs serve a call."""
        return self.hold(self.of(tensors), self.n_traced)

    def function(self, values: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Numbers that may be symbolic, as a function of the sizes."""
        return shapes.function_of(self.symbols, values)


def among_tensors(open_dims: Open, leaves: Sequence[Any]) -> Open:
    """The same by the place among the tensors of a call, rather than among its leaves."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return {places.index(i): dims for i, dims in open_dims.items()}


@dataclass(frozen=True, slots=True, repr=False)
class Inside:
    """A stride that steps over all of another dimension, as in a tensor without gaps."""

    dim: int

    def __repr__(self) -> str:
        return f"over dimension {self.dim}"


def strides_of(tensor: Tensor) -> list[int | Inside]:
    """The strides of a tensor, as a rule that other sizes can follow."""
    shape, strides = tensor.shape, tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: _nesting(tensor, dim))
    rule: list[int | Inside] = list(strides)
    for inner, dim in itertools.pairwise(order):
        if strides[dim] == strides[inner] * shape[inner] and strides[inner]:
            rule[dim] = Inside(inner)
    return rule


def _nesting(tensor: Tensor, dim: int) -> tuple[int, int, int]:
    return tensor.stride(dim), tensor.shape[dim], -dim


def open_sizes(module: GraphModule, sizes: Sizes, n_state: int) -> None:
    """Give a graph placeholders for its open sizes, behind those of parameters and buffers.

    Every number that depends on a size is computed from these, so that any program can have it.
    """
    graph = module.graph
    nodes = sizes.placeholders(graph, graph.find_nodes(op="placeholder")[n_state])
    for node in list(graph.nodes):
        if node.op == "call_function" and is_number(node):
            found = shapes.computed(node, node.meta["val"], sizes.symbols, nodes)
            node.replace_all_uses_with(found)
            graph.erase_node(node)
