"""Parameter groups: the sites and the weight side of an eager tape, by what hangs together.

The first step of `funcstage.autograd`, whose docstring says what sites and the two sides are. What it returns
are the groups of `torch.distributed.pipelining`, which hand on from I to W what W does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.autograd.graph import GradientEdge, Node

from funcstage._torch.tape import Edge, is_python
from funcstage.engines.rules.group_norm import refuse_without_dx

NumberedEdges = tuple[tuple[int, Edge], ...]
"""Edges of one node, each with its place in `node.next_functions`."""


class Site(NamedTuple):
    """Where weights' gradients start: an entry of `param_groups[i]["intermediates"]`.

    `weight_edges` are the node's edges into the weight side, and empty where the node itself is of the weight
    side: an output that depends on no input. `owner` keeps a Python node alive.
    """

    node: Node
    weight_edges: NumberedEdges
    owner: Node | None


def param_groups_of(
    roots: Sequence[GradientEdge], inputs: set[Edge], weights: Sequence[Node]
) -> list[dict[str, Any]]:
    """The connected components of sites and weight side below `roots`, in the weights' order."""
    roots = [root for root in roots if root[:2] not in inputs]
    tape, owners = walk(roots, inputs)
    outermost, is_weight = {root.node for root in roots}, set(weights)
    input_side: set[Node] = set()
    weight_side: set[Node] = set()
    sites: list[Site] = []
    leader: dict[Node, Node] = {}
    for node, edges in tape.items():
        into_weights = tuple((k, edge) for k, edge in edges if edge not in inputs and edge[0] in weight_side)
        if any(edge in inputs or edge[0] in input_side for _, edge in edges):
            input_side.add(node)
            if into_weights:
                sites.append(Site(node, into_weights, owners[node]))
        elif into_weights or node in is_weight:
            weight_side.add(node)
            if node in outermost:
                sites.append(Site(node, (), owners[node]))
        if into_weights or node in is_weight:
            leader[node] = node
            for _, (after, _) in into_weights:
                leader[_find(leader, after)] = node

    groups: dict[Node, dict[str, Any]] = {}
    for node in weights:
        if node in weight_side:
            group = groups.setdefault(_find(leader, node), {"params": [], "intermediates": [], "grads": []})
            group["params"].append(node)
    for site in sites:
        groups[_find(leader, site.node)]["intermediates"].append(site)
    return list(groups.values())


def walk(
    roots: Sequence[GradientEdge], stops: set[Edge]
) -> tuple[dict[Node, NumberedEdges], dict[Node, Node | None]]:
    """Each node's edges, a node after all that it leads to; and who keeps each Python node alive.

    Iterative and linear in the number of edges: a stage may be thousands of operations deep.
    """
    entered: dict[Node, NumberedEdges] = {}
    tape: dict[Node, NumberedEdges] = {}
    owners: dict[Node, Node | None] = {}
    stack: list[tuple[Node, Node | None]] = [(root.node, root.ownership_token) for root in roots]
    while stack:
        node, above = stack[-1]
        if node in entered:
            stack.pop()
            tape.setdefault(node, entered[node])
            continue
        refuse_without_dx(node)
        owners[node] = above if is_python(node) else None
        following = enumerate(node.next_functions)
        edges = tuple((k, (after, number)) for k, (after, number) in following if after is not None)
        entered[node] = edges
        keeper = above if is_python(node) else node
        stack.extend((edge[0], keeper) for _, edge in edges if edge not in stops and edge[0] not in entered)
    return tape, owners


def _find(leader: dict[Node, Node], node: Node) -> Node:
    """The representative of a node's component, with path halving."""
    while leader[node] is not node:
        leader[node] = node = leader[leader[node]]
    return node
