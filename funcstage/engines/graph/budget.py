"""Budgets: how many bytes F may hand on -> what is saved within them, so that the least is computed again.

Candidates are the values that the minimum cut holds, beyond which nothing costly runs twice. Each saves the
operations between it and the others: a knapsack. A larger budget holds no less and saves no less.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Node

from funcstage.engines.graph import knapsack
from funcstage.engines.graph.cost import cost
from funcstage.engines.graph.crossing import Choice, Division, crossing
from funcstage.engines.graph.joint import is_random
from funcstage.engines.graph.knapsack import Item
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
    groups = _groups(best)
    items = [Item(nbytes_together(group), worth) for group, worth in groups]
    room = budget - least  # what is held for "full" and what is saved suffice, so no more is held than these
    saved = {node for i in knapsack.best(items, room) for node in groups[i][0]}
    return budget, saved.__contains__


def _groups(values: Iterable[Node]) -> list[tuple[list[Node], float]]:
    """Group values by the operation that makes them, with what it costs to make them again."""
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
        return sum(map(cost, between))

    return [(group, worth(maker)) for maker, group in groups.items()]


def _maker(node: Node) -> Node:
    """The operation in whose result a value lies."""
    while node.op == "call_function" and (node.target is operator.getitem or is_view(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node
