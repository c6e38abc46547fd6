"""An exact order, by mixed-integer programming, where few enough pairs of actions are undecided."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from funcstage.schedules.costs import Costs
from funcstage.schedules.orders import (
    Action,
    Order,
)

MAX_CHOICES = 400
"""Up to how many undecided pairs of actions the integer program is tried."""


def exact(
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
    program = _Program(placed, costs, microbatches)
    if not 0 < len(program.choice) <= MAX_CHOICES:
        return
    program.follow_needs(comm)
    program.one_at_a_time(makespan)
    if limit < float("inf"):
        program.hold_at_most(limit)
    solution = _solved(program, makespan, seconds)
    if solution is not None:
        ranks = tuple(program.in_order(actions, solution) for actions in program.ranks)
        yield Order("integer programming", len(costs), microbatches, ranks)


class _Program:
    """An integer program: variables by number, and rows that say what sums of them are at least.

    Attributes:
        ranks: the actions of each rank.
        actions: all of them.
        end: the variable of each action's end.
        choice: for each pair of a rank's actions that may go either way, the variable that says which.
        makespan: the variable of the end of all.
        rows: coefficients by variable.
        floors: what each row is at least.
    """

    def __init__(self, placed: list[list[int]], costs: Sequence[Costs], microbatches: int) -> None:
        self.costs = costs
        self.home = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
        self.ranks = [
            [Action(k, s, m) for m in range(microbatches) for s in stages for k in ("F", "I", "W")]
            for stages in placed
        ]
        self.actions = [action for of_rank in self.ranks for action in of_rank]
        self.pairs = [pair for of_rank in self.ranks for pair in itertools.combinations(of_rank, 2)]
        undecided = [pair for pair in self.pairs if not _decided(*pair) and not _decided(*pair[::-1])]
        self.end = {action: i for i, action in enumerate(self.actions)}
        self.choice = {pair: len(self.actions) + i for i, pair in enumerate(undecided)}
        self.makespan = len(self.actions) + len(undecided)
        self.rows: list[dict[int, float]] = []
        self.floors: list[float] = []

    def at_least(self, floor: float, terms: dict[int, float]) -> None:
        self.rows.append(terms)
        self.floors.append(floor)

    def before(self, a: Action, b: Action) -> tuple[float, int | None, float]:
        """Whether a goes before b: a constant, a variable and its factor."""
        if (a, b) in self.choice:
            return 0.0, self.choice[a, b], 1.0
        if (b, a) in self.choice:
            return 1.0, self.choice[b, a], -1.0
        return float(_decided(a, b)), None, 0.0

    def follow_needs(self, comm: float) -> None:
        """Let nothing begin before what it needs has ended and arrived."""
        end = self.end
        for action in self.actions:
            self.at_least(0, {self.makespan: 1, end[action]: -1})
            for need in action.needs(len(self.costs)):
                away = comm * (self.home[need.stage] != self.home[action.stage])
                floor = self.costs[action.stage].of(action) + away
                self.at_least(floor, {end[action]: 1, end[need]: -1})

    def one_at_a_time(self, makespan: float) -> None:
        """Let a rank's actions not overlap; `makespan` is an upper bound, which makes a choice idle."""
        end = self.end
        for a, b in self.pairs:
            cost_a, cost_b = self.costs[a.stage].of(a), self.costs[b.stage].of(b)
            if (a, b) in self.choice:
                chosen = self.choice[a, b]
                big_a, big_b = makespan + cost_a, makespan + cost_b
                self.at_least(cost_b - big_b, {end[b]: 1, end[a]: -1, chosen: -big_b})
                self.at_least(cost_a, {end[a]: 1, end[b]: -1, chosen: big_a})
            elif _decided(a, b):
                self.at_least(cost_b, {end[b]: 1, end[a]: -1})
            else:
                self.at_least(cost_a, {end[a]: 1, end[b]: -1})

    def hold_at_most(self, limit: float) -> None:
        """Keep what a rank holds after each action within a limit, in bytes."""
        unit = max(max(c.held_after_forward, c.held_after_input) for c in self.costs) or 1
        for of_rank in self.ranks:
            for b in of_rank:
                change = self.costs[b.stage].held(b)
                if change <= 0:
                    continue
                terms: dict[int, float] = {}
                left = limit - change
                for a in of_rank:
                    constant, variable, factor = self.before(a, b)
                    left -= constant * self.costs[a.stage].held(a)
                    if variable is not None:
                        terms[variable] = -factor * self.costs[a.stage].held(a) / unit
                self.at_least(-left / unit, terms)

    def in_order(self, of_rank: list[Action], solution: Sequence[float]) -> tuple[Action, ...]:
        """Sort a rank's actions as a solution says."""

        def place(b: Action) -> int:
            known = (self.before(a, b) for a in of_rank if a != b)
            return round(sum(c + (f * solution[v] if v is not None else 0.0) for c, v, f in known))

        return tuple(sorted(of_rank, key=place))


def _solved(program: _Program, makespan: float, seconds: float) -> Sequence[float] | None:
    """The variables at the least makespan found, or None: none was found in time, or scipy is not there."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        return None
    last, n_actions = program.makespan, len(program.actions)
    coordinates = [(i, j) for i, terms in enumerate(program.rows) for j in terms]
    values = [value for terms in program.rows for value in terms.values()]
    matrix = csr_array((values, tuple(zip(*coordinates, strict=True))), shape=(len(program.rows), last + 1))
    lower, upper = np.zeros(last + 1), np.full(last + 1, makespan)
    lower[:n_actions] = [program.costs[a.stage].of(a) for a in program.actions]
    upper[n_actions:last] = 1
    objective, integral = np.zeros(last + 1), np.zeros(last + 1)
    objective[last] = 1
    integral[n_actions:last] = 1
    solved = milp(
        objective,
        integrality=integral,
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(matrix, np.array(program.floors), np.inf),
        options={"time_limit": seconds},
    )
    found: Sequence[float] | None = solved.x
    return found


def _decided(a: Action, b: Action) -> bool:
    """Tell whether a goes before b on their rank in any order with the microbatches in turn."""
    if a.microbatch > b.microbatch or a == b:
        return False
    if a.stage == b.stage:
        return "FIW".index(a.kind) <= "FIW".index(b.kind)
    if a.kind == "F":
        return b.kind != "F" or a.stage < b.stage
    return a.kind == "I" and b.kind != "F" and a.stage > b.stage
