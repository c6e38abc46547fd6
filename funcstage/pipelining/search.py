"""Schedules found: an order for given costs and a memory limit, at least as good as the built-in ones.

Candidates are torch's schedules, ZB-H1, and a greedy heuristic after Qi et al., "Zero Bubble Pipeline
Parallelism" (arXiv 2401.10241), section 3.1, run with several settings. Where the problem is small and
scipy is installed, an integer program (the paper's appendix G) improves on the best of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from funcstage.pipelining.costs import Costs
from funcstage.pipelining.orders import (
    SCHEDULES,
    Action,
    Order,
    ScheduleError,
    check_count,
    pipeline_order,
)
from funcstage.pipelining.timeline import peak_memory, simulate

MAX_CHOICES = 400
"""Up to how many undecided pairs of actions the integer program is tried."""


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> Order:
    """Return ZB-H1: 1F1B whose W wait, on rank `r` for `r` microbatches (arXiv 2401.10241, section 2.3).

    It holds as much as 1F1B does, and leaves a third of its bubble where F, I and W take equally long.

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
    memory_limit: int | None = None,
    *,
    comm: float = 0.0,
    seconds: float = 10.0,
) -> Order:
    """Find an order of F, I and W that is fast for these costs and holds no more than a limit.

    Args:
        costs: of one stage a rank, or of two, which then form a V: rank `r` has the stages `r` and
            `2 * ranks - 1 - r`. Built-in schedules may place two stages in a loop instead.
        ranks: how many devices.
        microbatches: how many microbatches a step has.
        memory_limit: bytes of residuals that a rank may hold at a time; `None` is any number.
        comm: seconds until what one rank has computed is at hand on another.
        seconds: how long the integer program may search, where the problem is small and scipy is
            installed (the extra `schedules`); 0 leaves it out.

    Returns:
        The order with the least simulated makespan that was found, no worse than any built-in schedule
        that keeps to the limit. `write_order` makes a file of it for torch.

    Raises:
        ScheduleError: if the numbers do not fit, or no order keeps to the limit: then it says the least
            limit that one does.

    Example:
        >>> order = find_schedule([Costs(1, 1, 1, 2, 1)] * 4, ranks=4, microbatches=8, memory_limit=8)
        >>> simulate(order, [Costs(1, 1, 1)] * 4).makespan <= 3 * 8 + 3  # that of ZB-H1
        True
    """
    check_count("ranks", ranks)
    check_count("microbatches", microbatches)
    if len(costs) not in (ranks, 2 * ranks):
        raise ScheduleError(
            f"{ranks} ranks need the costs of {ranks} stages, or of {2 * ranks} for a V; got {len(costs)}."
        )
    placed = [[r] if len(costs) == ranks else [r, 2 * ranks - 1 - r] for r in range(ranks)]
    in_sequence = _in_sequence(placed, microbatches)
    simulate(in_sequence, costs, comm=comm)  # refuses bad costs
    least = max(peak_memory(in_sequence, costs))
    if memory_limit is not None and memory_limit < least:
        raise ScheduleError(
            f"No order holds at most {memory_limit:,} bytes a rank: a single microbatch in flight holds "
            f"{least:,}. Raise memory_limit to {least:,} at least, or cut the microbatch."
        )
    limit = float("inf") if memory_limit is None else memory_limit
    bound = _bound(placed, costs, microbatches, comm)

    def candidates() -> Iterator[Order]:
        yield from _built_in(len(costs), ranks, microbatches)
        for policy in _POLICIES:
            if makespan > bound:
                yield _greedy(placed, costs, microbatches, limit, comm, policy)
        if seconds > 0 and makespan > bound:
            yield from _exact(placed, costs, microbatches, limit, comm, makespan, seconds)

    best, makespan = in_sequence, simulate(in_sequence, costs, comm=comm).makespan
    for order in candidates():
        if max(peak_memory(order, costs)) <= limit:
            taken = simulate(order, costs, comm=comm).makespan
            if taken < makespan:
                best, makespan = order, taken
    return best


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
    return Order("in sequence", sum(map(len, placed)), microbatches, tuple(ranks))


def _built_in(num_stages: int, ranks: int, microbatches: int) -> Iterator[Order]:
    if num_stages == ranks:
        yield zero_bubble_h1(ranks, microbatches)
    for name in SCHEDULES:
        try:
            yield pipeline_order(name, num_stages, microbatches, num_ranks=ranks)
        except ScheduleError:
            continue  # one that cannot run these numbers


class _Policy(NamedTuple):
    """Settings of the heuristic.

    Attributes:
        in_flight: forwards a rank may be ahead of its I, in units of the ranks behind it.
        forward_first: whether F goes before I where both could run.
        patience: a rank waits for what arrives within this part of W's time rather than run W.
    """

    in_flight: float
    forward_first: bool
    patience: float


_POLICIES = [
    _Policy(*setting)
    for setting in itertools.product((1.0, 2.0, float("inf")), (False, True), (0.0, 0.5, 1.0))
]


def _greedy(
    placed: list[list[int]],
    costs: Sequence[Costs],
    microbatches: int,
    limit: float,
    comm: float,
    policy: _Policy,
) -> Order:
    """Fill the ranks in the order of time: I and F as they arrive, W in the gaps and for room.

    F of a rank's first stage leaves room for one microbatch of its second, so that the oldest
    microbatch in flight can always go on.
    """
    num_ranks, num_stages = len(placed), len(costs)
    home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
    arrived: dict[Action, float] = {}
    done: list[list[Action]] = [[] for _ in placed]
    pending: list[deque[Action]] = [deque() for _ in placed]
    next_of: dict[tuple[str, int], int] = {}
    held, ahead, free = [0] * num_ranks, [0] * num_ranks, [0.0] * num_ranks
    most = [max(c.held_after_forward, c.held_after_input) for c in costs]
    events = [(0.0, rank) for rank in range(num_ranks)]

    def due(kind: Any, stage: int) -> tuple[float, Action] | None:
        """The next action of a kind, and when what it needs is at hand, if that is known."""
        action = Action(kind, stage, next_of.get((kind, stage), 0))
        if action.microbatch == microbatches:
            return None
        at = 0.0
        for need in action.needs(num_stages):
            if need not in arrived:
                return None
            at = max(at, arrived[need] + comm * (home[need.stage] != home[stage]))
        return at, action

    def room(rank: int, action: Action) -> bool:
        stages = placed[rank]
        if action.kind == "I":
            return held[rank] + costs[action.stage].held(action) <= limit
        later = stages[stages.index(action.stage) + 1 :]
        needed = max(
            most[action.stage], *(costs[action.stage].held_after_forward + most[s] for s in later), 0
        )
        return held[rank] + needed <= limit

    while events:
        now, rank = heapq.heappop(events)
        if now < free[rank]:
            continue  # another event stands for when it is free
        stages = placed[rank]
        found = [d for kind in ("I", "F") for stage in reversed(stages) if (d := due(kind, stage))]
        cap = policy.in_flight * (num_ranks - rank if len(stages) == 1 else 2 * num_ranks - rank)
        fits = [
            (at, a)
            for at, a in found
            if room(rank, a)
            and (a.kind == "I" or a.stage != stages[0] or ahead[rank] < cap or (ahead[rank] == 0))
        ]
        ready = [a for at, a in fits if at <= now]
        soon = min((at for at, _ in fits if at > now), default=float("inf"))
        waits = pending[rank]
        if ready:
            action = min(ready, key=lambda a: (a.kind == "F") != policy.forward_first)
        elif waits and soon - now >= policy.patience * costs[waits[0].stage].weight:
            action = waits.popleft()
        else:
            if soon < float("inf"):
                heapq.heappush(events, (soon, rank))
            continue
        end = now + costs[action.stage].of(action)
        done[rank].append(action)
        free[rank] = end
        held[rank] += costs[action.stage].held(action)
        heapq.heappush(events, (end, rank))
        if action.kind == "W":
            continue
        arrived[action] = end
        next_of[action.kind, action.stage] = action.microbatch + 1
        if action.kind == "I":
            pending[rank].append(action._replace(kind="W"))
        if action.stage == stages[0]:
            ahead[rank] += 1 if action.kind == "F" else -1
        neighbour = action.stage + (1 if action.kind == "F" else -1)
        if 0 <= neighbour < num_stages and home[neighbour] != rank:
            at = max(end + comm, free[home[neighbour]])
            heapq.heappush(events, (at, home[neighbour]))
            heapq.heappush(events, (max(end, free[home[neighbour]]), home[neighbour]))
    return Order("found", num_stages, microbatches, tuple(map(tuple, done)))


def _exact(
    placed: list[list[int]],
    costs: Sequence[Costs],
    microbatches: int,
    limit: float,
    comm: float,
    makespan: float,
    seconds: float,
) -> Iterator[Order]:
    """Solve for the order as an integer program, if it is small and scipy is there.

    Variables: the end of each action, for each undecided pair of a rank whether the first goes before
    the second, and the makespan. Each kind of action goes through the microbatches in turn.
    """
    num_stages = len(costs)
    ranks = [
        [Action(k, s, m) for m in range(microbatches) for s in stages for k in ("F", "I", "W")]
        for stages in placed
    ]
    pairs = [pair for actions in ranks for pair in itertools.combinations(actions, 2)]
    undecided = [pair for pair in pairs if not _decided(*pair) and not _decided(*pair[::-1])]
    if not undecided or len(undecided) > MAX_CHOICES:
        return
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        return
    actions = [action for of_rank in ranks for action in of_rank]
    end = {action: i for i, action in enumerate(actions)}
    choice = {pair: len(actions) + i for i, pair in enumerate(undecided)}
    last = len(actions) + len(undecided)
    home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
    rows: list[dict[int, float]] = []
    floors: list[float] = []

    def at_least(floor: float, terms: dict[int, float]) -> None:
        rows.append(terms)
        floors.append(floor)

    def before(a: Action, b: Action) -> tuple[float, int | None, float]:
        """Whether a goes before b: a constant, a variable and its factor."""
        if (a, b) in choice:
            return 0.0, choice[a, b], 1.0
        if (b, a) in choice:
            return 1.0, choice[b, a], -1.0
        return float(_decided(a, b)), None, 0.0

    for action in actions:
        at_least(0, {last: 1, end[action]: -1})
        for need in action.needs(num_stages):
            away = comm * (home[need.stage] != home[action.stage])
            at_least(costs[action.stage].of(action) + away, {end[action]: 1, end[need]: -1})
    for a, b in pairs:
        cost_a, cost_b = costs[a.stage].of(a), costs[b.stage].of(b)
        if (a, b) in choice:
            big_a, big_b = makespan + cost_a, makespan + cost_b
            at_least(cost_b - big_b, {end[b]: 1, end[a]: -1, choice[a, b]: -big_b})
            at_least(cost_a, {end[a]: 1, end[b]: -1, choice[a, b]: big_a})
        elif _decided(a, b):
            at_least(cost_b, {end[b]: 1, end[a]: -1})
        else:
            at_least(cost_a, {end[a]: 1, end[b]: -1})
    for of_rank in ranks if limit < float("inf") else ():
        unit = max(max(c.held_after_forward, c.held_after_input) for c in costs) or 1
        for b in of_rank:
            change = costs[b.stage].held(b)
            if change <= 0:
                continue
            terms: dict[int, float] = {}
            left = limit - change
            for a in of_rank:
                constant, variable, factor = before(a, b)
                left -= constant * costs[a.stage].held(a)
                if variable is not None:
                    terms[variable] = -factor * costs[a.stage].held(a) / unit
            at_least(-left / unit, terms)
    coordinates = [(i, j) for i, terms in enumerate(rows) for j in terms]
    matrix = csr_array(
        ([value for terms in rows for value in terms.values()], tuple(zip(*coordinates, strict=True))),
        shape=(len(rows), last + 1),
    )
    lower, upper = np.zeros(last + 1), np.full(last + 1, makespan)
    lower[: len(actions)] = [costs[a.stage].of(a) for a in actions]
    upper[len(actions) : last] = 1
    objective, integral = np.zeros(last + 1), np.zeros(last + 1)
    objective[last] = 1
    integral[len(actions) : last] = 1
    solved = milp(
        objective,
        integrality=integral,
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(matrix, np.array(floors), np.inf),
        options={"time_limit": seconds},
    )
    if solved.x is None:
        return

    def place(b: Action, of_rank: list[Action]) -> int:
        known = (before(a, b) for a in of_rank if a != b)
        return round(sum(c + (f * solved.x[v] if v is not None else 0.0) for c, v, f in known))

    found = [tuple(sorted(of_rank, key=lambda b, r=of_rank: place(b, r))) for of_rank in ranks]  # type: ignore[misc]
    yield Order("found", num_stages, microbatches, tuple(found))


def _decided(a: Action, b: Action) -> bool:
    """Tell whether a goes before b on their rank in any order with the microbatches in turn."""
    if a.microbatch > b.microbatch or a == b:
        return False
    if a.stage == b.stage:
        return "FIW".index(a.kind) <= "FIW".index(b.kind)
    if a.kind == "F":
        return b.kind != "F" or a.stage < b.stage
    return a.kind == "I" and b.kind != "F" and a.stage > b.stage
