"""Orders against what a clock says of them, and their picture."""

from __future__ import annotations

import builtins
import itertools
from pathlib import Path
from typing import Any

import pytest

import funcstage as fs
from funcstage.pipelining import (
    SCHEDULES,
    Costs,
    Order,
    Timeline,
    pipeline_order,
    plot_timeline,
    simulate,
)

EQUAL = Costs(1.0, 1.0, 1.0)
SIZES = [(4, 4), (4, 8), (8, 8), (6, 12)]


def timelines() -> list[Timeline]:
    orders = [pipeline_order(name, *size) for name in SCHEDULES for size in SIZES]
    return [
        simulate(order, [Costs(1.0 + s, 0.5, 2.0) for s in range(order.num_stages)], comm=0.25)
        for order in orders
    ]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (8, 8)])
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_bubble_of_gpipe_and_1f1b_is_the_textbook_one(
    schedule: str, ranks: int, microbatches: int
) -> None:
    # (p - 1) / (m + p - 1), with p ranks and m microbatches: Narayanan et al., arXiv 2104.04473, section 2.2.
    timeline = simulate(pipeline_order(schedule, ranks, microbatches), [EQUAL] * ranks)
    assert timeline.bubble_fraction == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert timeline.makespan == pytest.approx(3 * (microbatches + ranks - 1))


def test_interleaving_shortens_the_bubble_by_the_number_of_stages_a_rank() -> None:
    timeline = simulate(pipeline_order("Interleaved1F1B", 8, 8), [EQUAL] * 8)
    assert timeline.order.num_ranks == 4
    assert timeline.bubble_fraction / (1 - timeline.bubble_fraction) == pytest.approx(3 / 8 / 2)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_splitting_the_backward_leaves_less_bubble_than_1f1b(schedule: str) -> None:
    split = simulate(pipeline_order(schedule, 8, 8), [EQUAL] * 8)
    reference = simulate(pipeline_order("1F1B", 4, 8), [Costs(2.0, 2.0, 2.0)] * 4)
    assert split.makespan < reference.makespan
    assert split.bubble_fraction < reference.bubble_fraction


@pytest.mark.parametrize("timeline", timelines(), ids=lambda t: f"{t.order.schedule}-{t.order.num_stages}")
def test_no_action_starts_before_what_it_needs_has_arrived(timeline: Timeline) -> None:
    order = timeline.order
    home = order.rank_of_stages()
    end = {done: span.end for spans in timeline.ranks for span in spans for done in span.action.gives()}
    assert len(end) == 3 * order.num_stages * order.num_microbatches
    for rank, spans in enumerate(timeline.ranks):
        assert [span.action for span in spans] == list(order.ranks[rank])
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
        for span in spans:
            for need in span.action.needs(order.num_stages):
                assert span.start >= end[need] + 0.25 * (home[need.stage] != rank)


def test_communication_delays_only_what_comes_from_another_rank() -> None:
    order = pipeline_order("GPipe", 2, 1)
    assert simulate(order, [EQUAL] * 2, comm=10.0).makespan == 6 + 2 * 10
    one_rank = pipeline_order("LoopedBFS", 2, 1, num_ranks=1)
    assert simulate(one_rank, [EQUAL] * 2, comm=10.0).makespan == 6


def test_a_full_backward_costs_both_halves_and_sends_when_both_are_done() -> None:
    timeline = simulate(pipeline_order("GPipe", 2, 1), [Costs(1.0, 2.0, 4.0)] * 2)
    assert [(str(s.action), s.start, s.end) for spans in timeline.ranks for s in spans] == [
        ("0F0", 0.0, 1.0),
        ("0B0", 8.0, 14.0),
        ("1F0", 1.0, 2.0),
        ("1B0", 2.0, 8.0),
    ]


def test_a_step_that_takes_no_time_has_no_bubble() -> None:
    timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 4), [Costs(0.0, 0.0, 0.0)] * 4)
    assert (timeline.makespan, timeline.bubble_fraction) == (0.0, 0.0)


def test_costs_that_do_not_fit_are_refused() -> None:
    order = pipeline_order("GPipe", 2, 2)
    with pytest.raises(fs.StageError, match="2 stages, but 3 costs are given"):
        simulate(order, [EQUAL] * 3)
    with pytest.raises(fs.StageError, match=r"costs\[1\] must be finite"):
        simulate(order, [EQUAL, Costs(1.0, -1.0, 0.0)])
    with pytest.raises(fs.StageError, match="comm must be finite"):
        simulate(order, [EQUAL] * 2, comm=float("nan"))


def test_an_order_whose_ranks_wait_for_each_other_is_found_out() -> None:
    order = pipeline_order("1F1B", 2, 2)
    backwards = Order("upside down", 2, 2, tuple(actions[::-1] for actions in order.ranks))
    with pytest.raises(RuntimeError, match=r"upside down.*deadlocks; waiting: 0B1, 1B1"):
        backwards.in_turn()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_timeline_is_drawn_into_a_file(schedule: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    axes = plot_timeline(simulate(pipeline_order(schedule, 4, 4), [EQUAL] * 4), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"{schedule}, 4 stages" in axes.get_title(loc="left")


def test_a_timeline_is_drawn_into_given_axes_with_microbatches_where_they_fit() -> None:
    from matplotlib.figure import Figure

    order = pipeline_order("ZBVZeroBubble", 4, 4)
    wide = Figure(figsize=(20, 3)).add_subplot()
    assert plot_timeline(simulate(order, [EQUAL] * 4), wide, title="mine") is wide
    assert wide.get_title(loc="left") == "mine"
    assert len(wide.texts) == sum(map(len, order.ranks))
    narrow = Figure(figsize=(1, 1)).add_subplot()
    assert len(plot_timeline(simulate(order, [EQUAL] * 4), narrow).texts) == 0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(fs.StageError, match=r"pip install 'funcstage\[demo\]'"):
        plot_timeline(simulate(pipeline_order("GPipe", 1, 1), [EQUAL]), "never.png")
