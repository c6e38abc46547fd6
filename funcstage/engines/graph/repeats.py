"""Repeats: the operations of a program in order -> parts, of which those of identical layers are alike.

Layers are found in the graph, not in the module: where the same operations with the same settings on the same
shapes come again and again, at one distance, there is a layer. Two parts that look alike need not be: whether
they are one program is told by their forms (`form`), which say all that a lowered program depends on. So a
layer that differs in anything that makes a difference is a part of its own.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from funcstage._torch.shapes import SYMBOLIC
from funcstage.engines.graph.mincut import nbytes
from funcstage.engines.graph.overlap import is_on_its_way


class Form(NamedTuple):
    """What a part looks like from outside and within; operations are numbered from 0, inputs from -1 down.

    So what is added at its end changes nothing of what says the rest.

    Attributes:
        inputs: what they are.
        operations: what they are, and what each reads.
        values: what the operations make.
        results: which of these are read outside.
    """

    inputs: tuple[Hashable, ...]
    operations: tuple[Hashable, ...]
    values: tuple[Hashable, ...]
    results: tuple[int, ...]


class Least(NamedTuple):
    """What is worth being a part of its own.

    Attributes:
        nodes: operations of a layer.
        times: how often it comes.
    """

    nodes: int
    times: int


def ordered(graph: Graph) -> list[Node]:
    """The operations of a graph in an order in which entries of results follow these."""
    order: list[Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        pending = [node]
        while pending:
            order.append(pending.pop())
            entries = [user for user in order[-1].users if user.target is operator.getitem]
            pending += sorted(entries, key=lambda entry: entry.args[1])
    return order


def parts_of(nodes: Sequence[Node], root: GraphModule, least: Least) -> list[Sequence[Node]]:
    """Divide operations, in their order, so that repeated ones are parts of their own.

    Args:
        nodes: as `ordered` returns them.
        root: what holds the graphs that operations run.
        least: what is worth it.

    Returns:
        The parts, in order; one where nothing is repeated.
    """
    numbers: dict[Hashable, int] = {}
    looks = [numbers.setdefault(_look(node, root), len(numbers)) for node in nodes]
    bounds = [0, *sorted(_bounds(looks, 0, len(nodes), _prices(nodes), least)), len(nodes)]
    return [nodes[a:b] for a, b in itertools.pairwise(dict.fromkeys(bounds))]


def _bounds(looks: Sequence[int], start: int, end: int, prices: Sequence[float], least: Least) -> set[int]:
    """Where to cut between `start` and `end`."""
    found = _unit(looks, start, end, prices, least)
    if found is None:
        return set()
    first, size = found
    unit = looks[first : first + size]
    bounds = {start, end}
    rest = at = start
    while at <= end - size:
        # On the left of the run any place will do, but its own must not be missed.
        aligned = at >= first or at + size <= first
        whole = aligned and looks[at] == unit[0] and looks[at : at + size] == unit
        if whole and prices[at] < NEVER and prices[at + size] < NEVER:
            bounds |= {at, at + size} | _bounds(looks, rest, at, prices, least)
            rest = at = at + size
        else:
            at += 1
    return bounds | _bounds(looks, rest, end, prices, least)


def _unit(
    looks: Sequence[int], start: int, end: int, prices: Sequence[float], least: Least
) -> tuple[int, int] | None:
    """What is repeated and saves most: where it comes first, and its size."""
    best: tuple[int, int] | None = None
    saved = 0
    for period in _periods(looks[start:end], least.nodes):
        for first, length in _runs(looks, start, end, period):
            times = length // period
            if times < least.times or (times - 1) * period <= saved:
                continue
            spare = length % period
            cuts = {
                phase: [prices[first + phase + i * period] for i in range(times + 1)]
                for phase in range(spare + 1)
            }
            # On equal terms from the beginning: what is left over at the end then begins as the others do.
            phase = min(cuts, key=lambda phase: (max(cuts[phase]), phase > 0, sum(cuts[phase])))
            if max(cuts[phase]) < NEVER:
                best, saved = (first + phase, period), (times - 1) * period
    return best


_MOST_PERIODS = 24


def _periods(looks: Sequence[int], least: int) -> list[int]:
    """Distances at which the same operation comes again, the most frequent first, or multiples of these."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for i, look in enumerate(looks):
        if look in last:
            distances[i - last[look]] += 1
        last[look] = i
    frequent = (distance for distance, _ in distances.most_common(_MOST_PERIODS))
    return [*dict.fromkeys(distance * -(-least // distance) for distance in frequent)]


def _runs(looks: Sequence[int], start: int, end: int, period: int) -> Iterator[tuple[int, int]]:
    """Stretches in which everything comes again after a period: where they begin, and their lengths."""
    begin = start
    for i in range(start, end - period + 1):
        if i == end - period or looks[i] != looks[i + period]:
            if i > begin:
                yield begin, i - begin + period
            begin = i + 1


NEVER = float("inf")


def _prices(nodes: Sequence[Node]) -> list[float]:
    """The price of a cut before each node and behind the last: bytes that cross it, or never."""
    place = {node: i for i, node in enumerate(nodes)}
    changes = [0.0] * (len(nodes) + 1)
    barred = [0.0] * (len(nodes) + 1)
    for node, i in place.items():
        last = max((place[user] for user in node.users if user in place), default=i)
        if last == i:
            continue
        value = node.meta["val"]
        crossable = isinstance(value, (Tensor, *SYMBOLIC)) and not is_on_its_way(node)
        into = changes if crossable else barred
        amount = nbytes(node) if crossable else 1
        into[i + 1] += amount
        into[last + 1] -= amount
    bytes_there = itertools.accumulate(changes)
    return [
        NEVER if bar else amount
        for amount, bar in zip(bytes_there, itertools.accumulate(barred), strict=True)
    ]


def _look(node: Node, root: GraphModule) -> Hashable:
    """What an operation looks like by itself: all but what it reads."""
    return node.target, _said(node.args, {}, root), _said(node.kwargs, {}, root), said_of(node.meta["val"])


def form(
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    results: Sequence[Node],
    root: GraphModule,
) -> Form:
    """All that a lowered part depends on; equal for parts of which one can run in place of the other.

    Args:
        nodes: the operations of the part.
        inputs: what they read from outside.
        results: which of them are read outside.
        root: what holds the graphs that operations run.
    """
    names = {node: ~i for i, node in enumerate(inputs)} | {node: i for i, node in enumerate(nodes)}
    return Form(
        tuple((is_state(node), said_of(node.meta["val"])) for node in inputs),
        tuple(
            (node.target, _said(node.args, names, root), _said(node.kwargs, names, root)) for node in nodes
        ),
        tuple(said_of(node.meta["val"]) for node in nodes),
        tuple(names[node] for node in results),
    )


def is_state(node: Node) -> bool:
    """Tell whether an input is there before and after a program runs: a parameter, a buffer, a constant."""
    return node.op == "get_attr" or (node.op == "placeholder" and node.name.startswith("state_"))


def graph_of(node: Node, root: GraphModule) -> GraphModule | None:
    """The graph that a node stands for, which an operation runs."""
    if node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(root)
    return value if isinstance(value, GraphModule) else None


def _said(argument: Any, names: Mapping[Node, int], root: GraphModule) -> Hashable:
    """An argument as something to compare, with nodes by their names."""
    if isinstance(argument, Node):
        graph = graph_of(argument, root)
        return ("node", names.get(argument)) if graph is None else _said_of_graph(graph)
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_said(each, names, root) for each in argument)
    if isinstance(argument, Mapping):
        return dict, tuple((key, _said(each, names, root)) for key, each in argument.items())
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice, tuple(_said(each, names, root) for each in parts)
    if isinstance(argument, (bool, int, float, complex, str, *SYMBOLIC)):
        return type(argument), repr(argument)  # 1 == 1.0 == True, and -0.0 == 0.0
    try:
        hash(argument)
    except TypeError:
        return id(argument)
    return argument


def _said_of_graph(graph: GraphModule) -> Hashable:
    """What an inner graph computes, if that is all in its code; else which one it is."""
    if graph.graph.find_nodes(op="get_attr") or graph.graph.find_nodes(op="call_module"):
        return id(graph)
    return graph.code, tuple(said_of(node.meta.get("val")) for node in graph.graph.nodes)


def said_of(value: Any) -> Hashable:
    """What there is to know of a value before it is computed."""
    if isinstance(value, Tensor):
        return (
            tuple(map(str, value.shape)),
            tuple(map(str, value.stride())),
            str(value.storage_offset()),
            value.dtype,
            value.device,
            value.is_conj(),
            value.is_neg(),
        )
    if isinstance(value, (tuple, list)):
        return tuple(map(said_of, value))
    return type(value), str(value)
