"""Chains: a program -> a chain of smaller ones, of which those that are alike are lowered once.

So what lowering costs does not grow with the number of identical layers. A chain holds what passes between
its programs as long as a later one reads it, so that everything is freed when it would be in one program.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from funcstage.engines.graph.extract import boxed
from funcstage.engines.graph.joint import results_of
from funcstage.engines.graph.repeats import Form, Least, graph_of, is_state, ordered, parts_of
from funcstage.engines.graph.runners import Lower, Runner
from funcstage.engines.graph.surplus import Part, Run, runs_of

OF_ANY_SIZE = Least(nodes=4, times=2)
WORTH_IT = Least(nodes=12, times=4)
"""Below it a compiler takes about as long, and sees more at once."""


class _Link(NamedTuple):
    """A program in a chain, which keeps values in a list.

    Attributes:
        run: the program.
        inputs: which values it reads.
        last: which of them nobody reads after it.
        results: where its results go; None where nobody reads one.
    """

    run: Runner
    inputs: tuple[int, ...]
    last: tuple[int, ...]
    results: tuple[int | None, ...]


def chained(lower: Lower, least: Least) -> Lower:
    """Lower programs with repeated parts as chains, any others as they are.

    Args:
        lower: what lowers each part.
        least: what is worth being a part.

    Returns:
        What lowers programs so. It knows what it has lowered before.
    """
    known: dict[Hashable, Runner] = {}

    def lower_chained(module: GraphModule, donated: Collection[str]) -> Runner:
        parts = _parts(module, donated, least)
        if len(parts) < 2:
            return lower(module, donated)
        runs = runs_of(parts, module)
        # What not all of them may overwrite, none does: else there would be several programs.
        common: dict[Form, frozenset[int]] = {}
        for run in runs:
            common[run.form] = common.get(run.form, run.donated) & run.donated
        runners = {}
        for run in runs:
            if run.form not in runners:
                key = run.form, common[run.form]
                if key not in known:
                    small, names = _program(module, run.model)
                    known[key] = lower(small, {names[i] for i in common[run.form]})
                runners[run.form] = known[key]
        return _runner(module, [(run, runners[run.form]) for run in runs])

    return lower_chained


def _parts(module: GraphModule, donated: Collection[str], least: Least) -> list[Part]:
    """Divide a program; a single part is all of it."""
    graph = module.graph
    divided = parts_of(ordered(graph), module, least)
    home = {node: i for i, nodes in enumerate(divided) for node in nodes}
    returned = set(results_of(graph))
    parts = []
    for i, nodes in enumerate(divided):
        read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        inputs = [node for node in read if home.get(node) != i and graph_of(node, module) is None]
        results = [node for node in nodes if node in returned or any(home.get(u, i) != i for u in node.users)]
        # Views of it that an earlier part has made would be overwritten as well.
        own = (
            k
            for k, node in enumerate(inputs)
            if node.name in donated and {home.get(user) for user in node.users} == {i}
        )
        parts.append(Part(nodes, inputs, results, frozenset(own)))
    return parts


def _program(module: GraphModule, part: Part) -> tuple[GraphModule, list[str]]:
    """A part as a program, and what its inputs are called."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for i, node in enumerate(part.inputs):
        copies[node] = graph.placeholder(f"{'state' if is_state(node) else 'value'}_{i}")
        copies[node].meta = dict(node.meta)

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    results = [*map(copied, part.nodes)]
    place = dict(zip(part.nodes, results, strict=True))
    graph.output(tuple(place[node] for node in part.results))
    return boxed(module, graph), [copies[node].name for node in part.inputs]


def _runner(module: GraphModule, runs: Sequence[tuple[Run, Runner]]) -> Runner:
    """What runs one part after the other."""
    graph = module.graph
    given = graph.find_nodes(op="placeholder")
    captured = [node for node in graph.find_nodes(op="get_attr") if graph_of(node, module) is None]
    slots: dict[Node | None, int] = {node: i for i, node in enumerate((*given, *captured))}
    for run, _ in runs:
        for node in run.results:
            if node is not None:
                slots[node] = len(slots)
    results = [slots.get(node) for node in results_of(graph)]
    left: dict[int, int] = {}
    for i, (run, _) in enumerate(runs):
        left.update(dict.fromkeys((slots[node] for node in run.inputs), i))
    kept = set(results)
    links = []
    for i, (run, runner) in enumerate(runs):
        inputs = tuple(slots[node] for node in run.inputs)
        last = tuple(slot for slot in dict.fromkeys(inputs) if left[slot] == i and slot not in kept)
        links.append(_Link(runner, inputs, last, tuple(map(slots.get, run.results))))
    tensors = [getattr(module, str(node.target)) for node in captured]
    n = len(slots) - len(given) - len(captured)

    def run_chain(inputs: list[Tensor]) -> Sequence[Tensor | None]:
        values: list[Any] = [*inputs, *tensors, *[None] * n]
        inputs.clear()
        for run, reads, last, places in links:
            read = [values[i] for i in reads]
            for i in last:
                values[i] = None
            for place, value in zip(places, run(read), strict=True):
                if place is not None:
                    values[place] = value
            value = None  # the next program may be its last reader
        return tuple([None if i is None else values[i] for i in results])

    return run_chain
