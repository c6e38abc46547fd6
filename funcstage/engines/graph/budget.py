"""Budgets: how many bytes F may hand on -> what is saved within them, so that the least is computed again.

Candidates are the values that the minimum cut holds, beyond which nothing costly runs twice. Each saves the
operations between it and the others. They are taken by how much that is for each byte, those that do not fit
left out: the greedy way to fill a knapsack. A larger budget then holds no less and saves no less: the first
value that it takes and a smaller one does not is larger than the room which that had left, and worth more.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Node

from funcstage.engines.graph.cost import cost
from funcstage.engines.graph.crossing import Choice, Division, crossing
from funcstage.engines.graph.joint import is_random
from funcstage.engines.graph.mincut import nbytes_together
from funcstage.engines.graph.nodes import is_view


def within(division: Division, share: float) -> tuple[int, Choice]:
    """Choose what is computed again, so that F hands on no more than a share of the bytes.

    Args:
        division: of the joint graph.
        share: of the bytes between what "full" and "none" hand on.

    Returns:
        How many bytes F may hand on, and the choice.
    """
    least, most = (nbytes_together(crossing(division, remat).after_forward) for remat in ("full", "none"))
    budget = int(least + share * (most - least))
    best = crossing(division, "min_cut").after_forward
    if nbytes_together(best) <= budget:
        return budget, "min_cut"
    saved: set[Node] = set()
    left = budget - least  # what is held for "full" and what is saved suffice, so no more is held than these
    for group in _ranked(best):
        size = nbytes_together(group)
        if size <= left:
            saved.update(group)
            left -= size
    return budget, saved.__contains__


def _ranked(values: Iterable[Node]) -> list[list[Node]]:
    """Group values by the operation that makes them, the most costly for a byte first."""
    groups: dict[Node, list[Node]] = {}
    for node in values:
        if node.op == "call_function" and not is_random(node):
            groups.setdefault(_maker(node), []).append(node)
    saved = {*values, *groups}

    def worth(maker: Node) -> float:
        between = {maker}
        stack = [maker]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in between and source not in saved and _maker(source) not in saved:
                    between.add(source)
                    stack.append(source)
        return sum(map(cost, between)) / max(nbytes_together(groups[maker]), 1)

    return [groups[maker] for maker in sorted(groups, key=worth, reverse=True)]


def _maker(node: Node) -> Node:
    """The operation in whose result a value lies."""
    while node.op == "call_function" and (node.target is operator.getitem or is_view(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node
