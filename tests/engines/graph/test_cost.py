"""What an operation costs: what it computes or moves, whichever takes longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from funcstage.engines.graph.cost import FLOPS_PER_BYTE, cost, flops

aten = torch.ops.aten


def node_of(operation: Any, *shapes: tuple[int, ...]) -> Node:
    """A node that runs an operation on tensors of these shapes, with what it returns noted on it."""
    graph = Graph()
    given = [torch.empty(shape, device="meta") for shape in shapes]
    nodes = []
    for i, tensor in enumerate(given):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = tensor
    node = graph.call_function(operation, tuple(nodes))
    node.meta["val"] = operation(*given)
    return node


@pytest.mark.parametrize(
    ("operation", "shapes", "computed", "moved"),
    [
        (aten.mm.default, [(64, 512), (512, 256)], 2 * 64 * 512 * 256, 4 * (64 * 512 + 512 * 256 + 64 * 256)),
        (aten.mm.default, [(600, 600), (600, 600)], 2 * 600**3, 4 * 3 * 600**2),
        (aten.add.Tensor, [(3, 4), (4,)], 0, 4 * (12 + 4 + 12)),
    ],
)
def test_an_operation_takes_as_long_as_it_computes_or_moves(
    operation: Any, shapes: list[tuple[int, ...]], computed: int, moved: int
) -> None:
    node = node_of(operation, *shapes)
    assert flops(node) == computed
    assert cost(node) == max(computed, FLOPS_PER_BYTE * moved)


def test_arguments_and_views_cost_nothing() -> None:
    node = node_of(aten.t.default, (3, 4))
    assert cost(node) == 0
    assert [*map(cost, node.all_input_nodes)] == [0]
    assert cost(node.graph.output(node)) == 0


def test_what_several_tensors_hold_is_moved() -> None:
    node = node_of(aten.aminmax.default, (3, 4))
    assert cost(node) == FLOPS_PER_BYTE * 4 * (12 + 1 + 1)
