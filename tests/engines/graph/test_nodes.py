"""What kinds of nodes there are: those of a table, and what depends on what in a small graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from funcstage._torch import shapes
from funcstage.engines.graph.nodes import behind, dependents, is_cheap, is_view

aten = torch.ops.aten


def node_of(operation: Any, *args: Any, entry: int | None = None) -> Node:
    """A node of an operation on one tensor, or of an entry of its result."""
    graph = Graph()
    node = graph.call_function(operation, (graph.placeholder("x"), *args))
    return node if entry is None else graph.call_function(operator.getitem, (node, entry))


@pytest.mark.parametrize(
    ("node", "view", "cheap"),
    [
        (node_of(aten.t.default), True, True),
        (node_of(aten.reshape.default, [4]), True, True),
        (node_of(aten.split.Tensor, 1, entry=0), True, True),
        (node_of(aten.sin.default), False, True),
        (node_of(aten.clone.default), False, True),
        (node_of(torch.ops.prims.convert_element_type.default, torch.float64), False, True),
        (node_of(aten.frexp.Tensor, entry=1), False, True),
        (node_of(aten.native_layer_norm.default, [4], None, None, 1e-5, entry=0), False, False),
        (node_of(aten.mm.default), False, False),
        (node_of(aten.sum.default), False, False),
        (node_of(aten.rand_like.default), False, False),
        (node_of(aten.bernoulli.p, 0.5), False, False),
        (node_of(torch.sin), False, False),
        (node_of(aten.mm.default).all_input_nodes[0], False, False),
    ],
    ids=str,
)
def test_views_take_no_memory_and_what_maps_elements_is_cheap(node: Node, view: bool, cheap: bool) -> None:
    assert is_view(node) is view
    assert is_cheap(node) is cheap


def test_a_number_that_depends_on_sizes_is_a_view_and_cheap() -> None:
    node = node_of(operator.mul, 2)
    node.meta["val"] = shapes.symbol(shapes.environment(), 3, "a size") * 2
    assert is_view(node)
    assert is_cheap(node)


def test_what_depends_on_nodes_and_what_lies_behind_them() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    a = graph.call_function(aten.sin.default, (x,))
    b = graph.call_function(aten.add.Tensor, (a, y))
    c = graph.call_function(aten.mul.Tensor, (b, b))
    graph.output((c, a))
    assert dependents(graph, [x]) == {x, a, b, c}
    assert dependents(graph, [y]) == {y, b, c}
    assert behind([c], {a, b, c}) == {a, b, c}
    assert behind([c], {a, c}) == {c}, "nothing beyond what is not within"
    assert behind([c, a], {a, c}) == {a, c}
    assert behind([b], {a}) == set()
