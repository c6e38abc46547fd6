"""W in pieces: the program W -> programs for groups of parameters, each gradient whole in one of them.

What several pieces need and is cheap, each computes for itself. What is not cheap (the chain of cotangents
of a stage without differentiated inputs, a forward that is computed again) is a program of its own, which
runs when W is split, and hands its results on: so pieces may run in any order, and nothing runs twice.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch.fx import Graph, Node

from funcstage._torch.shapes import is_number
from funcstage.engines.graph.cost import cost
from funcstage.engines.graph.extract import Program, boxed
from funcstage.engines.graph.joint import results_of
from funcstage.engines.graph.nodes import is_cheap
from funcstage.engines.pieces import balanced, connected


class Pieces(NamedTuple):
    """W, divided.

    Attributes:
        first: what runs before any of the pieces, if there is anything; all of its results are handed on.
        handed: these results, by what the pieces call them.
        programs: the pieces, with the results of W, `None` where that is another one's.
        common: inputs that several of the programs read.
    """

    first: Program | None
    handed: dict[str, Node]
    programs: tuple[Program, ...]
    common: frozenset[str]


def divide(program: Program, parts: int) -> Pieces:
    """Divide W by parameters.

    Args:
        program: W; left as it is.
        parts: how many pieces at most; they cost as much as one another, as far as that can be.
    """
    results: Sequence[Node | None] = results_of(program.module.graph)
    there = [i for i, node in enumerate(results) if node is not None]
    needed = _needed_for(program.module.graph, results)
    groups = _groups(needed, there)
    group_of = {i: k for k, group in enumerate(groups) for i in group}
    costs = [0.0] * len(groups)
    for node, serves in needed.items():
        mine = {group_of[i] for i in serves}
        if len(mine) == 1 or is_cheap(node):
            for k in mine:
                costs[k] += cost(node)
    runs = balanced(costs, parts)
    if len(runs) < 2:
        return Pieces(None, {}, (program,), frozenset())
    piece_of = {i: piece for piece, run in enumerate(runs) for k in run for i in groups[k]}
    chosen = [{i for i, of in piece_of.items() if of == piece} for piece in range(len(runs))]
    several = [n for n, results_of in needed.items() if len({piece_of[i] for i in results_of}) > 1]
    before = _behind([node for node in several if not is_cheap(node)], ())
    for node in needed:
        if node.target is operator.getitem and node.args[0] in before:
            before[node] = None  # an entry of a result is handed on, which itself cannot be
    wanted = [[node if i in piece else None for i, node in enumerate(results)] for piece in chosen]
    read = {source for piece in wanted for node in _behind(piece, before) for source in node.all_input_nodes}
    read.update(node for node in results if node is not None)
    handed_on = [node for node in needed if node in before and node in read and not is_number(node)]
    crossing = {node: f"handed_{node.name}" for node in handed_on}
    first = cut_out(program, [*crossing], {}) if crossing else None
    programs = tuple(cut_out(program, piece, crossing) for piece in wanted)
    # What is handed on may lie in the memory of what `first` reads.
    times = Counter(name for piece in (first, *programs) if piece is not None for name in piece.inputs)
    common = frozenset(name for name, n in times.items() if n > 1)
    return Pieces(first, {name: node for node, name in crossing.items()}, programs, common)


def _needed_for(graph: Graph, results: Sequence[Node | None]) -> dict[Node, set[int]]:
    """The operations of a program, in order, each with the results that it is needed for."""
    needed: dict[Node, set[int]] = {node: set() for node in graph.nodes if node.op == "call_function"}
    for i, node in enumerate(results):
        if node in needed:
            needed[node].add(i)
    for node in reversed(needed):
        for source in node.all_input_nodes:
            if source in needed:
                needed[source] |= needed[node]
    return {node: results_of for node, results_of in needed.items() if results_of}


def _groups(needed: dict[Node, set[int]], results: Sequence[int]) -> list[list[int]]:
    """Group results which only one product stands behind, as those of a weight's norm and direction.

    Those are the smallest sets that share what is not cheap. Larger sets share a chain, which can be cut.
    """
    sets = {frozenset(s) for node, s in needed.items() if len(s) > 1 and not is_cheap(node)}
    smallest = [s for s in sets if not any(other < s for other in sets)]
    members = [{i, *(-1 - k for k, s in enumerate(smallest) if i in s)} for i in results]
    return [[results[j] for j in group] for group in connected(members)]


def _behind(results: Iterable[Node | None], given: Iterable[Node]) -> dict[Node, None]:
    """What must be computed for some results, where some nodes are given."""
    stop = set(given)
    stack = [node for node in results if node is not None and node not in stop]
    found = dict.fromkeys(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and source not in stop:
                found[source] = None
                stack.append(source)
    return found


def cut_out(program: Program, results: Sequence[Node | None], given: dict[Node, str]) -> Program:
    """Cut the program of some results out of another, which reads what is given under other names."""
    root = program.module
    graph = Graph()
    copies: dict[Node, Node] = {}
    wanted = _behind(results, given)
    nodes = [node for node in root.graph.nodes if node in wanted]
    read = {source for node in nodes for source in node.all_input_nodes} | {n for n in results if n in given}
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    for node, name in given.items():
        if node in read:
            copies[node] = graph.placeholder(name)
            copies[node].meta = dict(node.meta)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(None if node is None else copies[node] for node in results))
    inputs = tuple(node.name for node in graph.find_nodes(op="placeholder"))
    names = tuple(None if node is None else node.name for node in results)
    return Program(boxed(root, graph), inputs, names)
