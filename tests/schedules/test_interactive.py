"""Timelines to zoom into, and tables as data frames: they say what the timeline does, or what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import funcstage as fs
from funcstage.pipelining import Costs, interactive_timeline, pipeline_order, plot_memory, simulate
from funcstage.testing import check_stage

TIMELINE = simulate(pipeline_order("ZBVZeroBubble", 4, 4), [Costs(1, 1.5, 0.5, 4, 2)] * 4)


def test_an_interactive_timeline_has_a_bar_for_each_action() -> None:
    pytest.importorskip("plotly")
    figure = interactive_timeline(TIMELINE)
    bars = {
        (row, start, start + width)
        for bar in figure.data
        for row, start, width in zip(bar.y, bar.base, bar.x, strict=True)
    }
    assert bars == {
        (f"rank {rank}", span.start, span.end) for rank, spans in enumerate(TIMELINE.ranks) for span in spans
    }
    assert [bar.name[0] for bar in figure.data] == ["F", "I", "W"]


def test_several_timelines_are_written_as_one_page_that_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    other = simulate(pipeline_order("1F1B", 4, 4), [Costs(1, 1.5, 0.5)] * 4)
    interactive_timeline([TIMELINE, other], tmp_path / "step.html")
    page = (tmp_path / "step.html").read_text()
    assert "1F1B: rank 3" in page
    assert "<script src=" not in page.replace(" charset=", " ")
    with pytest.raises(fs.StageError, match="or more, got none"):
        interactive_timeline([])


def test_timelines_of_one_schedule_have_rows_of_their_own() -> None:
    pytest.importorskip("plotly")
    slower = simulate(TIMELINE.order, [Costs(2, 1.5, 0.5)] * 4)
    figure = interactive_timeline([TIMELINE, slower])
    for number, timeline in enumerate((TIMELINE, slower), start=1):
        ends = [
            start + width
            for bar in figure.data
            for row, start, width in zip(bar.y, bar.base, bar.x, strict=True)
            if row == f"ZBVZeroBubble ({number}): rank 0"
        ]
        assert sorted(ends) == sorted(span.end for span in timeline.ranks[0])


def test_tables_become_data_frames() -> None:
    pytest.importorskip("pandas")
    actions = TIMELINE.to_pandas()
    assert len(actions) == sum(map(len, TIMELINE.order.ranks))
    assert (actions.end - actions.start).sum() == pytest.approx(TIMELINE.busy)
    assert actions[actions["rank"] == 1].end.max() == TIMELINE.ranks[1][-1].end
    apply, params, buffers = fs.functionalize(nn.Linear(3, 2))
    plan = fs.compile(apply, backend="aten").plan(params, buffers, torch.ones(4, 3))
    assert plan.to_pandas().flops.sum() == plan.flops
    report = check_stage(nn.Linear(3, 2), torch.ones(4, 3), engines=("closures", "aten"))
    leaves = report.to_pandas()
    assert len(leaves) == len(report.leaves)
    assert leaves.accepted.all()


@pytest.mark.parametrize(
    ("package", "extra"), [("plotly", "funcstage.interactive."), ("pandas", "pip install pandas")]
)
def test_what_is_not_installed_is_named(package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fs.StageError, match=extra):
        interactive_timeline(TIMELINE) if package == "plotly" else TIMELINE.to_pandas()


def test_the_curve_of_memory_has_no_dip_of_no_width(tmp_path: Path) -> None:
    # W ends, and F starts at once: what is held goes from 1 to 1, whatever it was in between.
    axes = plot_memory(TIMELINE, tmp_path / "memory.svg")
    for line in axes.lines[: TIMELINE.order.num_ranks]:
        times = list(line.get_xdata())
        assert times == sorted(set(times))
    assert max(max(line.get_ydata()) for line in axes.lines[:4]) == max(TIMELINE.peak_memory)
