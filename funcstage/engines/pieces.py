"""W in pieces: which parts of it belong together, and how they are dealt out in pieces of equal cost."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence


def connected(members: Sequence[Collection[Hashable]]) -> list[list[int]]:
    """Group what has a member in common with one another, directly or by way of others.

    Args:
        members: of each part.

    Returns:
        The numbers of the parts of each group, in order; the groups by their first.
    """
    leader = list(range(len(members)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    owner: dict[Hashable, int] = {}
    for i, of_part in enumerate(members):
        for member in of_part:
            a, b = find(owner.setdefault(member, i)), find(i)
            leader[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in range(len(members)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def balanced(costs: Sequence[float], parts: int) -> list[range]:
    """Cut a row into `parts` runs, none of them empty, so that the costliest costs as little as can be.

    Args:
        costs: of the entries of the row.
        parts: how many runs; as many as entries, where there are fewer.
    """
    parts = min(parts, len(costs))
    low, high = max(costs, default=0.0), float(sum(costs))
    for _ in range(50):  # halvings of the interval in which the least limit lies
        middle = (low + high) / 2
        low, high = (low, middle) if len(_runs(costs, middle)) <= parts else (middle, high)
    runs = _runs(costs, high)
    while len(runs) < parts:  # more cuts never cost anything
        i = max(range(len(runs)), key=lambda i: (len(runs[i]) > 1, sum(costs[j] for j in runs[i])))
        run = runs[i]
        half = min(run[1:], key=lambda j: abs(sum(costs[run.start : j]) - sum(costs[j : run.stop])))
        runs[i : i + 1] = [range(run.start, half), range(half, run.stop)]
    return runs


def _runs(costs: Sequence[float], limit: float) -> list[range]:
    runs: list[range] = []
    start, total = 0, 0.0
    for i, cost in enumerate(costs):
        if i > start and total + cost > limit:
            runs.append(range(start, i))
            start, total = i, 0.0
        total += cost
    return [*runs, range(start, len(costs))] if costs else runs
