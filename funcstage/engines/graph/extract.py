"""Graphs of programs, cut out of the joint graph, and what they may overwrite or give away."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from funcstage._torch.tracing import BoxedCodeGen, LazyGraphModule
from funcstage.engines.graph.joint import Joint
from funcstage.engines.graph.nodes import aten, is_view
from funcstage.engines.graph.overlap import overlap
from funcstage.engines.graph.replay import drawn_once


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """One of the three graphs.

    Attributes:
        module: a graph of placeholders, ATen operations and one flat tuple of results.
        inputs: the placeholders' names, which are names of the joint graph.
        results: the results' names there, `None` where there is no result.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    results: tuple[str | None, ...]


def extract(
    joint: Joint,
    constants: Iterable[Node],
    inputs: Iterable[Node],
    prompt: set[Node],
    results: Sequence[Node | None],
    draws: Sequence[Node] = (),
    own: bool = False,
) -> Program:
    """Build the program that computes `results` from those of `inputs` that they need.

    It draws all of `draws`, in order, whether anybody reads them or not: what is drawn next depends on it.

    The operations of `prompt` run in the order of the joint graph; all others, which are recomputations,
    run when they are first read, so that not all of them are alive together, and results among them as
    soon as nothing else waits for what they are made from.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    boundary = {*constants, *inputs}
    wanted = set()
    stack = [*draws, *(node for node in results if node is not None)]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            if node not in boundary:
                stack.extend(node.all_input_nodes)
    given = [node for node in inputs if node in wanted]
    for node in given:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    nodes = [node for node in joint.module.graph.nodes if node in wanted]
    state = {*constants, *joint.placeholders[: joint.n_state]}
    for root in _schedule(nodes, prompt, boundary, state, results):
        pending = [root]
        while pending:
            node = pending[-1]
            missing = [source for source in node.all_input_nodes if source not in copies]
            if node in copies or not missing:
                pending.pop()
                if node not in copies:
                    copies[node] = graph.node_copy(node, copies.__getitem__)
            else:
                pending.extend(reversed(missing))
    graph.output(tuple(None if node is None else copies[node] for node in results))
    drawn_once(graph)
    if own:
        own_results(graph)
    overlap(graph)
    return Program(
        boxed(joint.module, graph),
        tuple(node.name for node in given),
        tuple(None if node is None else node.name for node in results),
    )


def _schedule(
    nodes: Sequence[Node],
    prompt: set[Node],
    held: set[Node],
    state: set[Node],
    results: Iterable[Node | None],
) -> list[Node]:
    """Order the prompt operations and the results.

    A result that is recomputed follows the last prompt operation that reads what it is made from: that is
    free then, and a compiler can have both from one pass over it.

    Args:
        nodes: what the program consists of, in graph order.
        prompt: what keeps its order.
        held: the inputs; `state` are those of them that are held anyway.
        results: the results.
    """
    order = {node: i for i, node in enumerate(node for node in nodes if node in prompt)}
    last_use = dict.fromkeys(nodes, -1)
    for node in reversed(nodes):
        for read in node.all_input_nodes if node not in held else ():
            last_use[read] = max(last_use[read], order.get(node, last_use[node]))
    due: dict[Node, int] = {}
    for node in nodes:
        if node in held:
            due[node] = -1 if node in state else last_use[node]
        else:
            due[node] = order.get(node, max((due[read] for read in node.all_input_nodes), default=-1))
    recomputed = {node: due[node] for node in results if node is not None and node not in order}
    return sorted([*order, *recomputed], key=lambda node: (due[node], node in recomputed))


def boxed(root: GraphModule, graph: Graph) -> GraphModule:
    """A module that takes its arguments in one list and empties it, so that each is freed after its use.

    Its Python is written when it is first run or read: a compiler wants the graph alone.
    """
    graph.set_codegen(BoxedCodeGen())
    return LazyGraphModule(root, graph)


def own_results(graph: Graph) -> None:
    """Copy results that lie in the memory of an input or of one another, so that each can be added into."""
    (output,) = graph.find_nodes(op="output")
    taken: set[Node] = set()
    owned: list[Node | None] = []
    for node in output.args[0]:
        if node is not None:
            base = _base(node)
            value = node.meta["val"]
            if base.op != "call_function" or base in taken or 0 in value.stride():
                with graph.inserting_before(output):
                    copy = graph.call_function(
                        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                copy.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
                node = copy
            taken.add(base)
        owned.append(node)
    output.args = (tuple(owned),)


def giving_away(program: Program, names: Collection[str]) -> Program:
    """Return a program whose results are the inputs of `names` where they are copies of these.

    Args:
        program: left as it is.
        names: inputs that nobody reads after the program.
    """
    graph = Graph()
    results: list[Any] = list(graph.graph_copy(program.module.graph, {}))  # type: ignore[arg-type]
    given: set[Node] = set()
    for i, result in enumerate(results):
        if result is not None and result.target is aten.clone.default:
            source = result.args[0]
            base = _base(source)
            if base.name in names and base not in given and source.meta["val"].is_contiguous():
                given.add(base)
                results[i] = source
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    return replace(program, module=boxed(program.module, graph))


def _base(node: Node) -> Node:
    """The node in whose memory another lies."""
    while node.op == "call_function" and is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
