"""Together: I and W -> one program, for where both are one action: W computes while I's messages travel.

Tensor-parallel trainers do this by hand: the sum of a layer's input gradient over ranks travels beside the
product that is the layer's weight gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch.fx import Graph, Node

from funcstage.engines.graph.extract import Program, boxed
from funcstage.engines.graph.joint import Joint, is_random, results_of
from funcstage.engines.graph.nodes import behind, dependents
from funcstage.engines.graph.overlap import awaits_message, is_message, is_wait, overlap


def hides_messages(input_grad: Program, weight_grad: Program) -> bool:
    """Tell whether either sends messages, and neither draws random numbers, whose order must stay."""
    nodes = [*input_grad.module.graph.nodes, *weight_grad.module.graph.nodes]
    return any(map(is_message, nodes)) and not any(map(is_random, nodes))


def together(
    joint: Joint, input_grad: Program, weight_grad: Program, made: Sequence[str], linear: Collection[str]
) -> Program:
    """Join I and W.

    Args:
        joint: the graph that both are of.
        input_grad: I.
        weight_grad: W.
        made: the names that the last results of I have as inputs of W.
        linear: the inputs of W that depend on cotangents.

    Returns:
        The program of I's results, `None` in the place of each of `made`, followed by those of W.
    """
    first, second = input_grad.module.graph, weight_grad.module.graph
    of_input, of_weight = results_of(first), results_of(second)
    n_grads = len(of_input) - len(made)
    from_input = dict(zip(made, of_input[n_grads:], strict=True))
    taken = second.find_nodes(op="placeholder")
    handed = {node: source for node in taken if (source := from_input.get(node.name)) is not None}
    graph = Graph()
    given: dict[str, Node] = {}
    copies: dict[Node, Node] = {}
    state = {node.name: i for i, node in enumerate(joint.placeholders[: joint.n_state])}
    inputs = [*first.find_nodes(op="placeholder"), *(node for node in taken if node not in handed)]
    for node in sorted(inputs, key=lambda node: state.get(node.name, len(state))):
        if node.name not in given:
            given[node.name] = graph.node_copy(node)
        copies[node] = given[node.name]

    def copy(node: Node) -> Node:
        return copies[handed.get(node, node)]

    for node in _in_order(first, second, handed, linear, {*copies}):
        copies[node] = graph.node_copy(node, copy)
    results = [*of_input[:n_grads], *[None] * len(made), *of_weight]
    graph.output(tuple(None if node is None else copy(node) for node in results))
    overlap(graph)
    names = (*input_grad.results[:n_grads], *[None] * len(made), *weight_grad.results)
    return Program(boxed(joint.module, graph), tuple(given), names)


def handing_on(weight_grad: Program) -> tuple[Program, tuple[str, ...]]:
    """What is left of W where I has computed it: gradients, handed on; and their names as its inputs."""
    graph = Graph()
    names = tuple(f"grad_{i}" for i in range(len(weight_grad.results)))
    there = [name for name, result in zip(names, weight_grad.results, strict=True) if result is not None]
    given = {name: graph.placeholder(name) for name in there}
    graph.output(tuple(given.get(name) for name in names))
    return Program(boxed(weight_grad.module, graph), tuple(there), weight_grad.results), names


def _in_order(
    first: Graph,
    second: Graph,
    handed: Mapping[Node, Node],
    linear: Collection[str],
    done: set[Node],
) -> Iterator[Node]:
    """Yield the operations of I, then those of W; before each wait, what W can compute by then of cotangents.

    What W recomputes from residuals alone follows with whoever reads it, so that it is not held meanwhile.
    """
    mine, rest = ([n for n in graph.nodes if n.op in _OPERATIONS] for graph in (first, second))
    place = {node: i for i, node in enumerate(rest)}
    urgent = behind([node for node in rest if is_message(node) or is_wait(node)], {*rest})
    of_cotangents = dependents(second, [n for n in second.find_nodes(op="placeholder") if n.name in linear])
    work = [node for node in rest if node in of_cotangents and node not in urgent]
    left = {*rest}
    for node in [*mine, *(n for n in rest if n in urgent), *rest]:
        if node in done:
            continue
        for wanted in work if awaits_message(node) else ():
            needed = behind([wanted], left)
            sources = {handed.get(source, source) for n in needed for source in n.all_input_nodes}
            if sources <= done | needed and not any(map(is_wait, needed)):
                yield from sorted(needed, key=place.__getitem__)
                done |= needed
                left -= needed
        yield node
        done.add(node)
        left.discard(node)


_OPERATIONS = ("call_function", "get_attr")
