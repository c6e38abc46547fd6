"""For any costs and any limit that can be kept, a found order is valid, and no built-in one is faster."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from funcstage.pipelining import (
    SCHEDULES,
    Costs,
    ScheduleError,
    find_schedule,
    peak_memory,
    pipeline_order,
    simulate,
    zero_bubble_h1,
)

SECONDS = st.integers(0, 20).map(lambda tenths: tenths / 10)
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, st.integers(0, 9), st.integers(0, 9))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Costs], int, int, float, int | None]:
    ranks = draw(st.integers(1, 5), label="ranks")
    stages = ranks * draw(st.integers(1, 2), label="stages a rank")
    costs = draw(st.lists(COSTS, min_size=stages, max_size=stages), label="costs")
    limit = draw(st.none() | st.integers(0, 60), label="limit")
    return costs, ranks, draw(st.integers(1, 8), label="microbatches"), draw(SECONDS, label="comm"), limit


@settings(max_examples=settings.default.max_examples)
@given(problem=problems())
def test_no_built_in_schedule_within_the_limit_is_faster_than_the_found_one(
    problem: tuple[list[Costs], int, int, float, int | None],
) -> None:
    costs, ranks, microbatches, comm, limit = problem
    others = [zero_bubble_h1(ranks, microbatches)] if len(costs) == ranks else []
    for name in SCHEDULES:
        try:
            others.append(pipeline_order(name, len(costs), microbatches, num_ranks=ranks))
        except ScheduleError:
            continue
    others = [order for order in others if limit is None or max(peak_memory(order, costs)) <= limit]
    try:
        found = find_schedule(costs, ranks, microbatches, limit, comm=comm, seconds=0.2)
    except ScheduleError:
        assert not others
        return
    timeline = simulate(found, costs, comm=comm)
    done = [part for actions in found.ranks for action in actions for part in action.gives()]
    assert len(done) == len(set(done)) == 3 * len(costs) * microbatches
    assert limit is None or max(timeline.peak_memory) <= limit
    for order in others:
        built_in = simulate(order, costs, comm=comm).makespan  # of the same numbers, added in another order
        assert timeline.makespan <= built_in * (1 + 1e-12), order.schedule
