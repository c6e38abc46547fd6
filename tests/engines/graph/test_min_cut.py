"""Minimum cuts: the cheapest, the latest of these, and told without the solver where that can be."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from funcstage.engines.graph import mincut
from funcstage.engines.graph.mincut import min_cut


def chain_of(reads: list[set[int]], prices: list[float]) -> tuple[list[Node], dict[Node, Any], Any]:
    """Nodes, what they read (-1 is the source), and their prices."""
    graph = Graph()
    nodes = [graph.call_function(torch.sin, ()) for _ in reads]
    reading = {nodes[i]: {None if j < 0 else nodes[j] for j in found} for i, found in enumerate(reads)}
    return nodes, reading, lambda node: prices[nodes.index(node)]


def cuts_off(cut: set[int], reads: list[set[int]], demanded: set[int]) -> bool:
    """Tell whether nothing that is demanded can be reached from the source but through the cut."""
    reached: set[int] = set()
    for i, found in enumerate(reads):
        if i not in cut and any(j < 0 or j in reached for j in found):
            reached.add(i)
    return not reached & demanded


@pytest.mark.parametrize("seed", range(150))
def test_no_cut_is_cheaper_and_none_as_cheap_is_later(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randrange(2, 8)
    reads = [{-1}]
    reads += [set(rng.sample(range(-1, i), min(i + 1, rng.randrange(0, 3)))) for i in range(1, n)]
    prices = [float(rng.randrange(1, 5)) for _ in range(n)]
    demanded = set(rng.sample(range(n), rng.randrange(1, min(n, 3) + 1)))
    nodes, reading, price = chain_of(reads, prices)
    before = {node: set(found) for node, found in reading.items()}
    cut = min_cut(reading, {nodes[i] for i in demanded}, price)
    assert reading == before
    assert cut == sorted(cut)
    found = {nodes.index(node) for node in cut}
    assert cuts_off(found, reads, demanded)
    subsets = (set(s) for k in range(n + 1) for s in itertools.combinations(range(n), k))
    possible = [s for s in subsets if cuts_off(s, reads, demanded)]
    least = min(sum(prices[i] for i in s) for s in possible)
    assert sum(prices[i] for i in found) == least
    cheapest = [s for s in possible if sum(prices[i] for i in s) == least]

    def left(cut: set[int]) -> set[int]:
        """What has to be computed after the cut."""
        behind: set[int] = set()
        stack = [i for i in demanded if i not in cut]
        while stack:
            i = stack.pop()
            if i not in behind:
                behind.add(i)
                stack += [j for j in reads[i] if j >= 0 and j not in cut]
        return behind

    assert all(left(found) <= left(other) for other in cheapest)


def test_chains_of_values_with_one_reader_never_reach_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    solve = mincut.boykov_kolmogorov

    def counted(flow: Any, *ends: Any) -> Any:
        sizes.append(len(flow))
        return solve(flow, *ends)

    monkeypatch.setattr(mincut, "boykov_kolmogorov", counted)
    nodes, reading, price = chain_of([{-1}, {0}, {1}, {2}], [3.0, 3.0, 2.0, 1.0])
    assert min_cut(reading, {nodes[3]}, price) == [nodes[3]]
    nodes, reading, price = chain_of([{-1}, {0}, {1}, {1}, {2, 3}], [1.0, 2.0, 3.0, 3.0, 9.0])
    assert min_cut(reading, {nodes[4]}, price) == [nodes[0]]
    assert sizes == [2, 2 + 2 * 5]
