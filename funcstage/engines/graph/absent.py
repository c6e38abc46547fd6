"""Absent cotangents: a program of the backward -> the same without what an absent input would add.

The backward is linear in its cotangents, so an operation all of whose cotangents are zero is zero and
need not run. A gradient that nothing contributes to is absent (`None`), as autograd has it, rather than
a tensor of zeros.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Graph, Node

from funcstage.engines.graph.extract import Program, boxed, own_results
from funcstage.engines.graph.joint import results_of
from funcstage.engines.graph.sizes import Sizes

aten = torch.ops.aten


def without(
    program: Program,
    linear: Collection[str],
    absent: Collection[str],
    sizes: Sizes | None = None,
    own: bool = False,
) -> Program:
    """Specialise a program to inputs that are absent.

    Args:
        program: I or W.
        linear: the inputs that it is linear in: cotangents, and what I made of them.
        absent: those of `linear` that are absent.
        sizes: the open ones, if any.
        own: whether each result must have memory of its own, as W's must.

    Returns:
        The program of the other inputs; its results are `None` where they would be zero.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    varying: set[Node] = set()
    zero: set[Node] = set()

    def copy(node: Node) -> Node:
        if node in zero and node not in copies:  # next to a value that is not zero
            value = node.meta["val"]
            copies[node] = graph.call_function(
                aten.full.default,
                (
                    [*value.shape]
                    if sizes is None
                    else sizes.computed(graph, [*given.values()], value.shape),
                    0,
                ),
                {"dtype": value.dtype, "device": value.device},
            )
            copies[node].meta["val"] = value
        return copies[node]

    given = {} if sizes is None else {node.name: node for node in sizes.placeholders(graph)}
    for node in program.module.graph.nodes:
        if node.op == "output":
            graph.output(tuple(None if n is None or n in zero else copies[n] for n in node.args[0]))
            continue
        if node.name in given:
            copies[node] = given[node.name]
            continue
        seeds = [source for source in node.all_input_nodes if source in varying]
        if (node.name in linear and node.op == "placeholder") or seeds:
            varying.add(node)
        if (node.name in absent and node.op == "placeholder") or (seeds and all(s in zero for s in seeds)):
            zero.add(node)
            continue
        terms = [source for source in seeds if source not in zero]
        if node.target is aten.add.Tensor and len(seeds) == 2 and len(terms) == 1 and _alike(terms[0], node):
            copies[node] = copies[terms[0]]
            continue
        copies[node] = graph.node_copy(node, copy)
    graph.eliminate_dead_code()
    if own:
        own_results(graph)
    names = tuple(node.name for node in graph.find_nodes(op="placeholder"))
    results = tuple(
        name if node is not None else None
        for name, node in zip(program.results, results_of(graph), strict=True)
    )
    return Program(boxed(program.module, graph), names, results)


def _alike(term: Node, total: Node) -> bool:
    """Tell whether a sum with zero is the term itself: no broadcasting, no promotion, no factor."""
    a, b = term.meta["val"], total.meta["val"]
    return isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype and not total.kwargs
