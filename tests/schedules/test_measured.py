"""Traces of a profiler become the timelines that they are of, and a wait is put down to its cause."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import funcstage as fs
from funcstage.__main__ import main
from funcstage.pipelining import (
    Action,
    Costs,
    Timeline,
    pipeline_order,
    pipeline_value_and_grad,
    read_trace,
    simulate,
    waits,
)

UNEVEN = [Costs(1.0, 2.0, 1.5), Costs(2.0, 1.0, 0.5), Costs(1.5, 1.5, 1.0), Costs(1.0, 1.0, 1.0)]


def written(timeline: Timeline, folder: Path, *, told: bool = True, zipped: bool = False) -> list[Path]:
    """Files as torch.profiler would have written them in the ranks' processes, an earlier step among it."""
    paths = []
    for rank, spans in enumerate(timeline.ranks):
        events: list[dict[str, Any]] = [{"ph": "X", "name": "aten::mm", "ts": 0.0, "dur": 1.0}]
        for step in (0, 1):
            for (kind, stage, microbatch), start, end in spans:
                at = (start + step * 1000 + 50) * 1e6 - rank * 1e6
                name = f"stage {stage} {kind} mb {microbatch}"
                events.append(
                    {"ph": "X", "cat": "user_annotation", "name": name, "ts": at, "dur": (end - start) * 1e6}
                )
        trace: dict[str, Any] = {"traceEvents": events, "baseTimeNanoseconds": rank * 10**9}
        if told:
            trace["distributedInfo"] = {"rank": rank}
        path = folder / f"{len(timeline.ranks) - rank}.json{'.gz' if zipped else ''}"
        with gzip.open(path, "wt") if zipped else open(path, "w") as file:
            json.dump(trace, file)
        paths.append(path)
    return paths


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble", "InterleavedZeroBubble"])
@pytest.mark.parametrize(("told", "zipped"), [(True, False), (False, True)])
def test_a_trace_of_a_step_is_read_as_its_timeline(
    schedule: str, told: bool, zipped: bool, tmp_path: Path
) -> None:
    timeline = simulate(pipeline_order(schedule, 4, 4), UNEVEN, comm=0.25)
    paths = written(timeline, tmp_path, told=told, zipped=zipped)
    found = read_trace(sorted(paths) if told else paths)
    assert found.order.ranks == timeline.order.ranks
    for ours, theirs in zip((*found.starts, *found.ends), (*timeline.starts, *timeline.ends), strict=True):
        assert list(ours) == pytest.approx(list(theirs), abs=1e-3)
    again = simulate(found.order, found.costs, comm=0.25)
    assert again.makespan == pytest.approx(timeline.makespan, abs=1e-3)


def test_a_gpus_times_count_where_there_are_any(tmp_path: Path) -> None:
    def event(category: str, ts: float, tid: int, dur: float = 5.0) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "tid": tid, "ts": ts, "dur": dur}

    names = ["stage 0 F mb 0", "stage 0 B mb 0"]
    events = [
        {**one, "name": name}
        for i, name in enumerate(names)
        for one in (
            event("user_annotation", 100.0 * i, 1),
            event("gpu_user_annotation", 100.0 * i + 50, 7, dur=20.0),
            event("gpu_user_annotation", 100.0 * i + 60, 8, dur=2.0),  # the stream of the messages
        )
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = read_trace(tmp_path / "trace.json")
    assert [tuple(span) for span in found.ranks[0]] == [
        (Action("F", 0, 0), pytest.approx(0), pytest.approx(20e-6)),
        (Action("B", 0, 0), pytest.approx(100e-6), pytest.approx(120e-6)),
    ]


def test_waits_are_the_bubble_and_say_what_they_wait_for() -> None:
    timeline = simulate(pipeline_order("1F1B", 2, 2), [Costs(1, 1, 1), Costs(1, 2, 1)], comm=0.5)
    found = waits(timeline)
    bubble = sum(wait.seconds for wait in found)
    assert bubble == pytest.approx(2 * timeline.makespan * timeline.bubble_fraction)
    assert [wait.seconds for wait in found] == sorted((wait.seconds for wait in found), reverse=True)
    first = next(wait for wait in found if wait.rank == 1 and wait.start == 0)
    assert (first.before, first.needs, first.needs_until) == (Action("F", 1, 0), Action("F", 0, 0), 1.0)
    assert str(first) == "1F0 needs 0F0"
    late = Timeline(
        timeline.order,
        timeline.costs,
        0.0,
        tuple(type(s)("d", [t * 2 for t in s]) for s in timeline.starts),
        tuple(
            type(e)("d", [s * 2 + 1 for s in starts])
            for starts, e in zip(timeline.starts, timeline.ends, strict=True)
        ),
    )
    assert any("the host or a message was late" in str(wait) for wait in waits(late))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "is not a trace in JSON"),
        ("[]", "has no actions of a pipeline"),
        ('{"other": 1}', "is not a trace in JSON"),
        ('{"traceEvents": [{"ph": "X", "name": "stage 0 F mb 0", "ts": 0, "dur": 1}]}', "0I0 is missing"),
    ],
)
def test_what_is_no_trace_of_a_step_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(fs.StageError, match=says):
        read_trace(path)


def test_a_step_that_was_profiled_is_laid_over_the_simulated_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [fs.functionalize(nn.Linear(3, 3)) for _ in range(2)]
    step = pipeline_value_and_grad(stages, nn.functional.mse_loss, schedule="1F1B", num_microbatches=2)
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    x = torch.ones(4, 3)
    step(params, buffers, x, x)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(params, buffers, x, x)
    trace, picture = tmp_path / "trace.json", tmp_path / "step.svg"
    profiled.export_chrome_trace(str(trace))
    assert main(["timeline", "--trace", str(trace), "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("measured: ")
    assert "simulated: " in out
    assert "where the bubble is" in out
    assert "<svg" in picture.read_text()
    assert main(["timeline", "--trace", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] >= found["simulated_seconds"] * 0.5 > 0
    assert sum(wait["seconds"] for wait in found["waits"]) == pytest.approx(
        found["seconds"] * found["bubble_fraction"]
    )
    assert main(["timeline", "--trace", str(tmp_path / "absent.json")]) == 1
    assert "absent.json cannot be read" in capsys.readouterr().err
