"""Orders of programs that send messages: what travels when, and that every value is there when it is read."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives  # whose operators are made use of
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from funcstage.engines.graph.overlap import overlap

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def gathered(graph: Graph, value: Node) -> Node:
    sent = graph.call_function(c10d.all_gather_into_tensor.default, (value, 2, "ranks"))
    return graph.call_function(c10d.wait_tensor.default, (sent,))


def sent_together(graph: Graph, *values: Node) -> list[Node]:
    sent = graph.call_function(c10d.all_gather_into_tensor_coalesced.default, (list(values), 2, "ranks"))
    sent.meta["val"] = [*values]
    return [graph.call_function(operator.getitem, (sent, i)) for i in range(len(values))]


def product(graph: Graph, *values: Node) -> Node:
    return graph.call_function(aten.mm.default, values)


def copied(graph: Graph, value: Node) -> Node:
    return graph.call_function(aten.clone.default, (value,))


def order_of(graph: Graph) -> list[str]:
    graph.lint()
    return [node.name.replace("_default", "") for node in graph.nodes if node.op == "call_function"]


def test_weights_travel_while_the_layer_before_computes() -> None:
    graph = Graph()
    x, *weights = (graph.placeholder(name) for name in ("x", "a", "b", "c"))
    whole = [copied(graph, gathered(graph, copied(graph, weight))) for weight in weights]
    for weight in whole:
        x = product(graph, x, weight)
    graph.output((x,))
    overlap(graph)
    assert order_of(graph) == [
        *("clone", "all_gather_into_tensor"),
        *("wait_tensor", "clone_2", "all_gather_into_tensor_1", "clone_1", "mm"),
        *("wait_tensor_1", "clone_4", "all_gather_into_tensor_2", "clone_3", "mm_1"),
        *("wait_tensor_2", "clone_5", "mm_2"),
    ]


def test_sums_travel_while_the_next_are_computed() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    grads = [product(graph, x, y) for _ in range(3)]
    sums = [
        graph.call_function(c10d.reduce_scatter_tensor.default, (copied(graph, grad), "sum", 2, "ranks"))
        for grad in grads
    ]
    waits = [graph.call_function(c10d.wait_tensor.default, (sent,)) for sent in sums]
    graph.output(tuple(copied(graph, wait) for wait in waits))
    overlap(graph)
    assert order_of(graph) == [
        *("mm", "clone", "reduce_scatter_tensor"),
        *("mm_1", "clone_1", "wait_tensor", "clone_3", "reduce_scatter_tensor_1"),
        *("mm_2", "clone_2", "wait_tensor_1", "clone_4", "reduce_scatter_tensor_2"),
        *("wait_tensor_2", "clone_5"),
    ]


def test_weights_that_travel_together_are_awaited_one_by_one_and_those_that_nobody_reads_stay() -> None:
    graph = Graph()
    x, *weights = (graph.placeholder(name) for name in ("x", "a", "b", "c", "d"))
    for pair in (weights[:2], weights[2:]):
        first, second = sent_together(graph, *pair)
        waits = [graph.call_function(c10d.wait_tensor.default, (part,)) for part in (first, second)]
        x = product(graph, product(graph, x, waits[1]), waits[0]) if pair[0] is weights[0] else x
    last = product(graph, x, waits[1])
    graph.erase_node(waits[0])
    graph.erase_node(first)
    graph.output((last,))
    overlap(graph)
    assert order_of(graph) == [
        *("all_gather_into_tensor_coalesced", "getitem", "getitem_1", "wait_tensor_1"),
        *("all_gather_into_tensor_coalesced_1", "getitem_3", "mm", "wait_tensor", "mm_1"),
        *("wait_tensor_3", "mm_2"),
    ]
    both, alone = (node for node in graph.nodes if "gather" in node.name)
    assert (both.args[0], alone.args[0], alone.meta["val"]) == (weights[:2], weights[3:], weights[3:])
    assert [node.args[1] for node in graph.nodes if node.target is operator.getitem] == [0, 1, 0]


def test_a_program_without_messages_stays_as_it_is() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((product(graph, copied(graph, x), x),))
    overlap(graph)
    assert order_of(graph) == ["clone", "mm"]


OPERATIONS = (aten.mm.default, aten.add.Tensor, aten.clone.default, aten.view.default)
KINDS = (*OPERATIONS, "message", "wait", "both", "several")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), max_size=30))
def test_every_value_is_there_when_it_is_read(steps: Sequence[tuple[object, int, int]]) -> None:
    graph = Graph()
    values = [graph.placeholder(name) for name in ("x", "y")]
    sent: list[Node] = []
    for kind, first, second in steps:
        left, right = values[first % len(values)], values[second % len(values)]
        if kind in ("message", "both"):
            sent.append(graph.call_function(c10d.all_reduce.default, (left, "sum", "ranks")))
        if kind == "several":
            sent += sent_together(graph, left, right)[: 1 + first % 2]
        if kind in ("wait", "both") and sent:
            awaited = sent[second % len(sent)]
            values.append(graph.call_function(c10d.wait_tensor.default, (awaited,)))
        elif kind is aten.view.default:
            values.append(graph.call_function(aten.view.default, (left, [-1])))
        elif kind is aten.clone.default:
            values.append(copied(graph, left))
        elif not isinstance(kind, str):
            values.append(graph.call_function(kind, (left, right)))
        if first == second:  # a result of a call, too
            values.append(graph.call_function(c10d.wait_tensor.default, (left,)))
    graph.output(tuple(values[2:]))
    for node in [*graph.nodes]:
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    reads = {node: read_of(node) for node in graph.nodes}
    overlap(graph)
    graph.lint()
    assert {node: read_of(node) for node in graph.nodes} == reads


def read_of(node: Node) -> list[Node]:
    """What a node reads; of several things that travel together those that somebody reads."""
    if node.target is operator.getitem:
        message, i = node.args
        return [message, message.args[0][i]]
    if node.args and isinstance(node.args[0], list):
        return [node.args[0][i] for i in sorted({user.args[1] for user in node.users})]
    return node.all_input_nodes
