"""Schedules found: an order for given costs and a memory limit, at least as good as the built-in ones.

Candidates are torch's schedules, ZB-H1, and a greedy heuristic after Qi et al., "Zero Bubble Pipeline
Parallelism" (arXiv 2401.10241), section 3.1, run with several settings. Where the problem is small and
scipy is installed, an integer program (the paper's appendix G) improves on the best of them. In the end
W is placed anew in the best order, whole or in pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from funcstage.schedules.costs import Costs
from funcstage.schedules.exact import exact
from funcstage.schedules.greedy import PATIENCE, POLICIES, greedy, refilled
from funcstage.schedules.orders import (
    SCHEDULES,
    Action,
    Order,
    ScheduleError,
    check_count,
    pipeline_order,
)
from funcstage.schedules.timeline import peak_memory, simulate


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> Order:
    """Return ZB-H1: 1F1B with W deferred, on rank `r` by `r` microbatches (arXiv 2401.10241, section 2.3).

    It holds as much as 1F1B, and has a third of its bubble if F, I and W take equally long.

    Args:
        num_ranks: how many, with one stage each.
        num_microbatches: how many microbatches a step has.

    Raises:
        ScheduleError: if a number is not a positive integer.

    Example:
        >>> print(*zero_bubble_h1(2, 3).ranks[1])
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    check_count("num_ranks", num_ranks)
    check_count("num_microbatches", num_microbatches)

    def actions(rank: int) -> Iterator[Action]:
        warm_up = min(num_ranks - 1 - rank, num_microbatches)
        for m in range(warm_up):
            yield Action("F", rank, m)
        for m in range(num_microbatches):
            if m + warm_up < num_microbatches:
                yield Action("F", rank, m + warm_up)
            yield Action("I", rank, m)
            if m >= rank:
                yield Action("W", rank, m - rank)
        for m in range(max(0, num_microbatches - rank), num_microbatches):
            yield Action("W", rank, m)

    ranks = tuple(tuple(actions(rank)) for rank in range(num_ranks))
    return Order("ZB-H1", num_ranks, num_microbatches, ranks)


def find_schedule(
    costs: Sequence[Costs],
    ranks: int,
    microbatches: int,
    memory_limit: float | None = None,
    *,
    comm: float = 0.0,
    seconds: float = 10.0,
    pieces: int = 1,
) -> Order:
    """Find an order of F, I and W that is fast for these costs and holds no more than a limit.

    Args:
        costs: of one stage a rank, or of two, which are placed in a V (rank `r` has the stages `r` and
            `2 * ranks - 1 - r`) or in a loop (`r` and `r + ranks`), whichever is faster.
        ranks: how many devices.
        microbatches: how many microbatches a step has.
        memory_limit: bytes of residuals that a rank may hold at a time; `None` is any number.
        comm: seconds until what one rank has computed is at hand on another.
        seconds: how long integer programming may take, if the problem is small and scipy is
            installed (the extra `schedules`); 0 leaves it out.
        pieces: in how many pieces W may be (`WeightPullback.split`), each with its share of the time and of
            the bytes: smaller ones fill smaller gaps. `pipeline_value_and_grad` runs such an order; torch's
            own runtime has no action for a piece.

    Returns:
        The order with the least simulated makespan that was found, no worse than any built-in schedule
        that keeps to the limit. Its name says what it is based on; `write_order` writes it for torch.

    Raises:
        ScheduleError: if the numbers do not fit, or no order meets the limit: then it names the smallest
            limit that can be met.

    Example:
        >>> order = find_schedule([Costs(1, 1, 1, 2, 1)] * 4, ranks=4, microbatches=8, memory_limit=8)
        >>> simulate(order, [Costs(1, 1, 1)] * 4).makespan <= 3 * 8 + 3  # that of ZB-H1
        True
    """
    check_count("ranks", ranks)
    check_count("microbatches", microbatches)
    check_count("pieces", pieces)
    if len(costs) not in (ranks, 2 * ranks):
        raise ScheduleError(
            f"{ranks} ranks need the costs of {ranks} stages, or of {2 * ranks} for a V; got {len(costs)}."
        )
    layouts = _layouts(len(costs), ranks)
    in_sequence = [_in_sequence(placed, microbatches) for placed in layouts]
    for order in in_sequence:
        simulate(order, costs, comm=comm)  # refuses bad costs
    least = min(max(peak_memory(order, costs)) for order in in_sequence)
    if memory_limit is not None and memory_limit < least:
        raise ScheduleError(
            f"No order holds at most {memory_limit:,} bytes a rank: a single microbatch in flight holds "
            f"{least:,}. Raise memory_limit to {least:,} at least, or make microbatches smaller."
        )
    limit = float("inf") if memory_limit is None else memory_limit

    def candidates() -> Iterator[Order]:
        yield from in_sequence
        yield from _built_in(len(costs), ranks, microbatches)
        for placed, one_at_a_time in zip(layouts, in_sequence, strict=True):
            if max(peak_memory(one_at_a_time, costs)) > limit:
                continue  # no order of this layout is within the limit
            bound = _bound(placed, costs, microbatches, comm)
            for policy in POLICIES:
                if makespan > bound:
                    yield greedy(placed, costs, microbatches, limit, comm, policy)
            if seconds > 0 and makespan > bound:
                share = seconds / len(layouts)
                yield from exact(placed, costs, microbatches, limit, comm, makespan, share)
        least_of_all = min(_bound(placed, costs, microbatches, comm) for placed in layouts)
        for parts, patience in itertools.product(sorted({1, pieces}), PATIENCE):
            if makespan > least_of_all and best is not None:
                anew = refilled(best, costs, limit, comm, patience, parts)
                yield from [] if anew is None else [anew]

    best: Order | None = None
    makespan = float("inf")
    for order in candidates():
        if max(peak_memory(order, costs)) <= limit:
            taken = simulate(order, costs, comm=comm).makespan
            if taken < makespan * (1 - 1e-12):  # sums in another order are no gain
                best, makespan = order, taken
    assert best is not None  # one microbatch after the other is within the limit
    return replace(best, schedule=f"found (based on {best.schedule})")


def _layouts(num_stages: int, ranks: int) -> list[list[list[int]]]:
    """The stages of each rank, in every way in which the built-in schedules place as many."""
    if num_stages == ranks:
        return [[[r] for r in range(ranks)]]
    v, loop = ([[r, 2 * ranks - 1 - r] for r in range(ranks)], [[r, r + ranks] for r in range(ranks)])
    return [v] if ranks == 1 else [v, loop]


def _bound(placed: list[list[int]], costs: Sequence[Costs], microbatches: int, comm: float) -> float:
    """Seconds that any order takes: of some rank, the wait for its first input and all its work."""
    home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
    arrival = [0.0]
    for stage in range(1, len(costs)):
        away = comm * (home[stage] != home[stage - 1])
        arrival.append(arrival[-1] + costs[stage - 1].forward + away)
    work = [microbatches * (cost.forward + cost.input + cost.weight) for cost in costs]
    ends = [min(arrival[s] for s in stages) + sum(work[s] for s in stages) for stages in placed]
    return max(ends) * (1 + 1e-12)  # sums in another order


def _in_sequence(placed: list[list[int]], microbatches: int) -> Order:
    """One microbatch after the other, which holds the least that is possible."""
    ranks = [
        tuple(
            action
            for m in range(microbatches)
            for action in (
                *(Action("F", s, m) for s in stages),
                *(Action(kind, s, m) for s in reversed(stages) for kind in ("I", "W")),
            )
        )
        for stages in placed
    ]
    return Order("one microbatch at a time", sum(map(len, placed)), microbatches, tuple(ranks))


def _built_in(num_stages: int, ranks: int, microbatches: int) -> Iterator[Order]:
    if num_stages == ranks:
        yield zero_bubble_h1(ranks, microbatches)
    for name in SCHEDULES:
        try:
            yield pipeline_order(name, num_stages, microbatches, num_ranks=ranks)
        except ScheduleError:
            continue  # one that cannot run these numbers
