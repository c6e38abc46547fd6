"""Orders that are found: valid, within the memory limit, and run by torch's own runtime."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pipeline_cases import Case, assert_same, expected, gathered, train
from pipeline_ranks import run

import funcstage as fs
from funcstage.pipelining import (
    Action,
    Costs,
    Order,
    find_schedule,
    peak_memory,
    pipeline_order,
    simulate,
    write_order,
    zero_bubble_h1,
)

UNEVEN = [Costs(1.0 + s % 3, 0.5 + s % 2, 1.5, 10 + s, 4 + s) for s in range(8)]


def assert_complete(order: Order, num_stages: int, num_microbatches: int) -> None:
    done = [part for actions in order.ranks for action in actions for part in action.gives()]
    wanted = itertools.product("FIW", range(num_stages), range(num_microbatches))
    assert sorted(done) == sorted(itertools.starmap(Action, wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 2), (4, 8), (8, 16)])
def test_zb_h1_has_the_bubble_and_the_memory_of_the_paper(ranks: int, microbatches: int) -> None:
    # (p - 1)(F + I - W), with what 1F1B holds: arXiv 2401.10241, table 2.
    costs = [Costs(1.0, 1.0, 1.0, 1, 1)] * ranks
    order = zero_bubble_h1(ranks, microbatches)
    assert_complete(order, ranks, microbatches)
    assert simulate(order, costs).makespan == pytest.approx(3 * microbatches + (ranks - 1))
    assert max(peak_memory(order, costs)) == max(
        peak_memory(pipeline_order("1F1B", ranks, microbatches), costs)
    )


@pytest.mark.parametrize("limit", [None, 100, 40])
@pytest.mark.parametrize(("ranks", "stages"), [(4, 4), (4, 8), (1, 1), (1, 2), (2, 4), (8, 8)])
def test_a_found_order_is_complete_and_within_the_limit(ranks: int, stages: int, limit: int | None) -> None:
    costs = UNEVEN[:stages]
    order = find_schedule(costs, ranks, 6, limit, comm=0.25, seconds=0)
    assert_complete(order, stages, 6)
    simulate(order, costs, comm=0.25)
    assert limit is None or max(peak_memory(order, costs)) <= limit


def test_with_room_for_twice_as_much_there_is_no_bubble_but_the_pipelines_own() -> None:
    # ZB-H2 of arXiv 2401.10241 fills all but the first rank's wait for nothing: p - 1 forwards on the last.
    costs = [Costs(1.0, 1.0, 1.0, 1, 1)] * 4
    order = find_schedule(costs, 4, 16, 8, seconds=0)
    assert simulate(order, costs).makespan <= simulate(zero_bubble_h1(4, 16), costs).makespan


@pytest.mark.parametrize("stages", [4, 8])
def test_a_limit_that_nothing_keeps_to_is_refused_with_the_least_that_works(stages: int) -> None:
    costs = UNEVEN[:stages]
    with pytest.raises(fs.StageError, match=r"Raise memory_limit to (\d+) at least") as refusal:
        find_schedule(costs, 4, 6, 1, seconds=0)
    least = int(str(refusal.value).split("Raise memory_limit to ")[1].split()[0])
    order = find_schedule(costs, 4, 6, least, seconds=0)
    assert max(peak_memory(order, costs)) == least
    with pytest.raises(fs.StageError, match="No order holds at most"):
        find_schedule(costs, 4, 6, least - 1, seconds=0)


@pytest.mark.parametrize("limit", [None, 25])
def test_the_integer_program_finds_an_order_no_longer_than_any_other(limit: int | None) -> None:
    pytest.importorskip("scipy")
    costs = [Costs(1.0, 2.0, 1.5, 10, 4), Costs(2.0, 1.0, 0.5, 10, 4)]
    order = find_schedule(costs, 2, 2, limit, seconds=600)
    assert_complete(order, 2, 2)
    each = [itertools.permutations([Action(k, s, m) for k in "FIW" for m in range(2)]) for s in range(2)]  # type: ignore[arg-type]
    valid = [[ranks for ranks in orders if in_turn(ranks)] for orders in each]
    best = float("inf")
    for ranks in itertools.product(*valid):
        other = Order("tried", 2, 2, ranks)
        if limit is not None and max(peak_memory(other, costs)) > limit:
            continue
        try:
            best = min(best, simulate(other, costs).makespan)
        except fs.StageError:
            continue  # the ranks wait for each other
    assert simulate(order, costs).makespan == pytest.approx(best)


def in_turn(actions: tuple[Action, ...]) -> bool:
    """Whether F, I and W of a microbatch come in this order, and microbatches in theirs."""
    place = {action: i for i, action in enumerate(actions)}
    return all(
        place[a] < place[b]
        for a, b in itertools.permutations(actions, 2)
        if a.microbatch <= b.microbatch and "FIW".index(a.kind) <= "FIW".index(b.kind)
    )


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(fs.StageError, match="costs of 3 stages, or of 6 for a V; got 4"):
        find_schedule(UNEVEN[:4], 3, 2)
    with pytest.raises(fs.StageError, match="microbatches must be a positive integer"):
        find_schedule(UNEVEN[:4], 4, 0)


@dataclass(frozen=True)
class Placed(Case):
    """A case whose stages are where an order has them."""

    stages: tuple[tuple[int, ...], ...] = ()

    def stages_of(self, rank: int, world_size: int) -> list[int]:
        return list(self.stages[rank])


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_torchs_runtime_trains_by_a_found_order_as_the_whole_model(
    num_stages: int, compile: Any, tmp_path: Path
) -> None:
    order = find_schedule(UNEVEN[:num_stages], 2, 6, 60, seconds=0)
    write_order(order, tmp_path / "order.csv")
    rows = tuple((tmp_path / "order.csv").read_text().replace(",", " ").splitlines())
    places = tuple(tuple(order.stages_of(rank)) for rank in range(2))
    case = Placed(rows, num_stages, 6, compile=compile, steps=2, stages=places)
    assert_same(gathered(run(2, train, case)), expected(case), rtol=1e-10, atol=1e-12)
