"""Which values to hold between two programs: a minimum cut by bytes, as in torch's own partitioner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import networkx as nx  # type: ignore[import-untyped]
from networkx.algorithms.flow import boykov_kolmogorov  # type: ignore[import-untyped]
from torch import Tensor
from torch.fx import Node

from funcstage._torch.shapes import hint
from funcstage._torch.tensors import memory_of


def nbytes(node: Node) -> int:
    """Bytes that saving a node's value keeps alive: all of the memory that a view looks into."""
    value = node.meta["val"]
    return hint(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0


def nbytes_together(nodes: Iterable[Node]) -> int:
    """Bytes that saving the values of nodes keeps alive, memory that several share counted once."""
    values = {memory_of(node.meta["val"]): node for node in nodes if isinstance(node.meta["val"], Tensor)}
    return sum(map(nbytes, values.values()))


def min_cut(
    reads: dict[Node, set[Node | None]], demanded: set[Node], price: Callable[[Node], float]
) -> list[Node]:
    """Cut all that is demanded off the source, at the least price, and of such cuts as late as possible.

    Every node is split in two, joined by an edge of its price; edges along the data flow have no limit.
    The solver takes time squared, so what can be told without it is: more than half of any real graph.

    Args:
        reads: what every node reads; `None` is the source. Left as it is.
        demanded: some of these nodes.
        price: of a node.

    Returns:
        The nodes that are cut, in graph order.
    """
    nodes = sorted(reads)
    reads = dict(reads)
    readers: defaultdict[Node | None, set[Node]] = defaultdict(set)
    for node in nodes:
        for read in reads[node]:
            readers[read].add(node)
    # A value of one reader that has no higher price is never the better of the two: it becomes part of it.
    for node in reversed(nodes):
        if node in demanded or len(readers[node]) != 1:
            continue
        (reader,) = readers[node]
        if price(reader) <= price(node):
            reads[reader] = reads[reader] - {node} | reads[node]
            for read in reads.pop(node):
                readers[read].remove(node)
                readers[read].add(reader)

    cut: list[Node] = []
    flow = nx.DiGraph()
    source, sink = -1, -2
    flow.add_nodes_from((source, sink))
    numbers: dict[Node, int] = {}
    for node in nodes:
        found = reads.get(node, set())
        if None in found and node in demanded:
            cut.append(node)  # in any case; what is made from such values alone is left out as well
            continue
        open = [source] if None in found else [numbers[read] + 1 for read in found if read in numbers]
        if open:
            i = numbers[node] = 2 * len(numbers)
            flow.add_edge(i, i + 1, capacity=price(node))
            flow.add_edges_from((j, i) for j in open)
            if node in demanded:
                flow.add_edge(i + 1, sink)
    # The solver's second tree is what can still reach the sink: all that lies behind the latest cut.
    _, behind = boykov_kolmogorov(flow, source, sink).graph["trees"]
    cut += (node for node, i in numbers.items() if i + 1 in behind and i not in behind)
    return sorted(cut)
