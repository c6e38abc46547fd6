"""Budgets: how many bytes F may hand on -> what is saved within them, so that the least is computed again.

Candidates are the values that the minimum cut holds, beyond which nothing costly runs twice. Each saves the
operations between it and the others: a knapsack. What is saved can spare what is held otherwise, an argument
for one; so where the knapsack has but few best choices, what each of them holds and computes again is looked
at. A larger budget then holds no less, and costs no more.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable

from torch.fx import Node

from funcstage.engines.graph.cost import cost, flops
from funcstage.engines.graph.crossing import Choice, Crossing, Division, crossing, recomputed
from funcstage.engines.graph.joint import is_random
from funcstage.engines.graph.knapsack import Item, Knapsack
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
    knapsack = Knapsack([Item(nbytes_together(group), worth) for group, worth in groups])

    def saving(chosen: Iterable[int]) -> Choice:
        return {node for i in chosen for node in groups[i][0]}.__contains__

    few = [*itertools.islice(knapsack.choices(), FEW + 1)]
    if len(few) > FEW:
        # What is held for "full" and what is saved suffice, so that no more is held than these.
        return budget, saving(knapsack.best(budget - least))
    tried = [(choice, crossing(division, choice)) for choice in map(saving, few)]
    fitting = [(c, found) for c, found in tried if nbytes_together(found.after_forward) <= budget]
    choice, _ = min(fitting or tried[:1], key=lambda pair: _price(division, pair[1]))
    return budget, choice


FEW = 128
"""Best choices that are all looked at: those of a stage of a few layers, at a millisecond or so each."""


def _price(division: Division, found: Crossing) -> tuple[float, float, int]:
    """What is computed again, in FLOPs and at what cost, and the bytes that are held."""
    again = recomputed(division, found)
    return sum(map(flops, again)), sum(map(cost, again)), nbytes_together(found.after_forward)


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
