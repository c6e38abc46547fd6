"""Orders against what a clock says of them, and their picture."""

from __future__ import annotations

import builtins
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import schedules

import funcstage as fs
from funcstage.pipelining import (
    SCHEDULES,
    Action,
    Costs,
    Order,
    Timeline,
    measure_costs,
    pipeline_order,
    planned_costs,
    plot_comparison,
    plot_memory,
    plot_timeline,
    read_order,
    simulate,
    write_chrome_trace,
    write_order,
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


def test_the_ranks_that_wait_for_each_other_are_named_by_the_simulation() -> None:
    order = pipeline_order("1F1B", 2, 2)
    backwards = Order("upside down", 2, 2, tuple(actions[::-1] for actions in order.ranks))
    with pytest.raises(fs.StageError, match=r"upside down.*deadlocks; waiting: 0B1, 1B1\. "):
        simulate(backwards, [EQUAL] * 2)


@pytest.mark.parametrize(("schedule", "held"), [("GPipe", [8, 8, 8, 8]), ("1F1B", [4, 3, 2, 1])])
def test_as_many_microbatches_are_held_as_the_papers_say(schedule: str, held: list[int]) -> None:
    # All microbatches, and those between a rank and the last: Narayanan et al., arXiv 2104.04473, 2.2.
    timeline = simulate(pipeline_order(schedule, 4, 8), [Costs(1.0, 1.0, 1.0, 100, 40)] * 4)
    assert timeline.peak_memory == [100 * count for count in held]
    for rank, peak in enumerate(timeline.peak_memory):
        curve = timeline.memory(rank)
        assert max(held for _, held in curve) == peak
        assert curve[-1] == (timeline.ends[rank][-1], 0)
        assert all(before[0] <= after[0] for before, after in itertools.pairwise(curve))


def test_what_is_held_changes_when_f_starts_and_when_i_and_w_end() -> None:
    order = Order("by hand", 1, 1, ((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),))
    timeline = simulate(order, [Costs(1.0, 2.0, 4.0, 100, 40)])
    assert timeline.memory(0) == [(0.0, 0), (0.0, 100), (3.0, 40), (7.0, 0)]


@pytest.mark.parametrize("timeline", timelines(), ids=lambda t: f"{t.order.schedule}-{t.order.num_stages}")
def test_nothing_idles_along_the_critical_path_but_messages(timeline: Timeline) -> None:
    path = timeline.critical_path()
    home = timeline.order.rank_of_stages()
    assert (path[0].start, path[-1].end) == (0.0, timeline.makespan)
    for before, after in itertools.pairwise(path):
        away = home[before.action.stage] != home[after.action.stage]
        assert after.start == before.end + timeline.comm * away


def test_a_trace_has_every_action_and_what_is_held_in_microseconds(tmp_path: Path) -> None:
    timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 4), [Costs(1.0, 2.0, 4.0, 100, 40)] * 4)
    write_chrome_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank, spans in enumerate(timeline.ranks):
        mine = [event for event in events if event["pid"] == rank]
        boxes = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in mine if e["ph"] == "X"]
        assert boxes == [(str(a), start * 1e6, end * 1e6) for a, start, end in spans]
        assert max(e["args"]["bytes"] for e in mine if e["ph"] == "C") == timeline.peak_memory[rank]


@pytest.mark.parametrize("comms", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_torch_dumps_is_read_as_the_order_that_it_is(name: str, comms: str, tmp_path: Path) -> None:
    order = pipeline_order(name, 4, 8)
    write_order(order, tmp_path / "mine.csv")
    stages = [
        SimpleNamespace(
            stage_index=i,
            num_stages=4,
            group_size=order.num_ranks,
            group_rank=0,
            is_first=i == 0,
            is_last=i == 3,
            submod=None,
        )
        for i in order.stages_of(0)
    ]
    runtime = schedules._PipelineScheduleRuntime(stages, 8)
    runtime._load_csv(tmp_path / "mine.csv")
    runtime._dump_csv(tmp_path / "theirs.csv", format=comms)
    found = read_order(tmp_path / "theirs.csv")
    assert (found.schedule, found.num_stages, found.num_microbatches) == ("theirs", 4, 8)
    assert found.ranks == order.ranks
    sends = comms == "compute_comms" and order.num_ranks > 1
    assert ("SEND_F" in (tmp_path / "theirs.csv").read_text()) == sends


def test_what_torchs_runtime_adds_is_no_work(tmp_path: Path) -> None:
    (tmp_path / "torch.csv").write_text(
        "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0WAIT_SEND_F0,0RESHARD,0REDUCE_GRAD,0WAIT_REDUCE_GRAD\n"
        "1RECV_F0,1F0,1I0,1SEND_B0,1W0,1WAIT_SEND_B0\n"
    )
    assert [" ".join(map(str, rank)) for rank in read_order(tmp_path / "torch.csv").ranks] == [
        "0F0 0B0",
        "1F0 1I0 1W0",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0F0,0B0,0WAIT_SEND_F", r"row 0, column 2: '0WAIT_SEND_F' is not an action"),
        ("0F0,0B0,0WAIT_F0", r"row 0, column 2: '0WAIT_F0' is not an action"),
        ("0F0,0B0,0WAIT_REDUCE_GRAD1", r"row 0, column 2: '0WAIT_REDUCE_GRAD1' is not an action"),
        ("0F0,0X0", r"row 0, column 1: '0X0' is not an action"),
        ("0F0,0B0,0W0", "0W0 occurs twice"),
        ("0F0,0I0", "0W0 is missing"),
        ("0F0,0B0\n0F1,0B1", "0F1 is on rank 1, but stage 0 is on rank 0"),
        ("", "no action in the file"),
    ],
)
def test_a_file_that_is_no_order_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "order.csv").write_text(text)
    with pytest.raises(fs.StageError, match=complaint):
        read_order(tmp_path / "order.csv")


def test_overlapped_pairs_and_idle_slots_of_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "order.csv").write_text("0F0,,0SEND_F0,(0F1;0B0)OVERLAP_F_B, 0B1 ")
    assert " ".join(map(str, read_order(tmp_path / "order.csv").ranks[0])) == "0F0 0F1 0B0 0B1"


def test_measured_costs_hold_what_pullbacks_hold_and_plans_say_the_same() -> None:
    stages = [fs.functionalize(nn.Sequential(nn.Linear(16, 16), nn.Tanh())) for _ in range(2)]
    stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    x = torch.randn(8, 16)
    costs = measure_costs(stages, nn.functional.mse_loss, x, x, repeats=2)
    for i, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        argnums = () if i == 0 else None
        plan = stage.apply.plan(stage.params, stage.buffers, x, argnums=argnums)
        planned = planned_costs(plan, flops_per_second=1e3, bytes_per_second=1e12)
        assert min(cost.forward, cost.input, cost.weight) > 0
        assert planned.forward == pytest.approx(2 * 8 * 16 * 16 / 1e3)
        assert planned.weight == pytest.approx(2 * 8 * 16 * 16 / 1e3)
        assert planned.input == pytest.approx(i * 2 * 8 * 16 * 16 / 1e3, abs=1e-6)
        _, _, pullback = fs.stage_vjp(stage.apply, stage.params, stage.buffers, x, argnums=argnums)
        assert cost.held_after_forward == pullback.nbytes
        _, weight_pullback = pullback(torch.ones_like(x))
        assert cost.held_after_input == weight_pullback.nbytes


def test_rates_and_repeats_that_mean_nothing_are_refused() -> None:
    with pytest.raises(fs.StageError, match="repeats must be a positive integer"):
        measure_costs([], nn.functional.mse_loss, (), (), repeats=0)
    with pytest.raises(fs.StageError, match="Peak rates must be positive"):
        planned_costs(None, flops_per_second=0, bytes_per_second=1)  # type: ignore[arg-type]


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


def test_memory_is_drawn_as_a_line_for_each_rank_under_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    timeline = simulate(pipeline_order("1F1B", 4, 8), [Costs(1, 1, 1, 3 << 20, 1 << 20)] * 4)
    axes = plot_memory(timeline, path, limit=16 << 20)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert axes.get_ylabel() == "residuals (MiB)"
    *ranks, limit = axes.get_lines()
    assert [max(line.get_ydata()) for line in ranks] == [12, 9, 6, 3]
    assert [line.get_ydata()[-1] for line in ranks] == [0, 0, 0, 0]
    assert set(limit.get_ydata()) == {16}
    assert axes.get_ylim()[1] > 16


def test_schedules_are_compared_on_one_clock_and_one_scale_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "comparison.svg"
    costs = [Costs(1, 1, 1, 3, 1)] * 4
    timelines = [simulate(pipeline_order(name, 4, 4), costs) for name in ("GPipe", "1F1B", "ZBVZeroBubble")]
    drawn = plot_comparison(timelines, path)
    assert "<svg" in path.read_text()
    assert len({(clock.get_xlim(), memory.get_ylim()) for clock, memory in drawn}) == 1
    titles = [clock.get_title(loc="left") for clock, _ in drawn]
    assert [title.split(",")[0] for title in titles] == ["GPipe", "1F1B", "ZBVZeroBubble"]
    with pytest.raises(fs.StageError, match="one timeline or more"):
        plot_comparison([], path)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(fs.StageError, match=r"pip install 'funcstage\[demo\]'"):
        plot_timeline(simulate(pipeline_order("GPipe", 1, 1), [EQUAL]), "never.png")


def test_orders_and_timelines_show_themselves_in_a_line() -> None:
    order = pipeline_order("1F1B", 2, 2)
    assert repr(order) == (
        "<Order 1F1B, 2 ranks, 2 stages, 2 microbatches: 0F0 0F1 0B0 0B1 | 1F0 1B0 1F1 1B1>"
    )
    large = pipeline_order("ZBVZeroBubble", 8, 8)
    assert repr(large) == "<Order ZBVZeroBubble, 4 ranks, 8 stages, 8 microbatches>"
    timeline = simulate(large, [Costs(1, 1, 1, 2, 1)] * 8)
    assert repr(timeline) == "<Timeline ZBVZeroBubble: 51 s for 8 microbatches, bubble 5.9%, on 4 ranks>"
