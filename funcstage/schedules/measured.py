"""Measured steps: a profiler's trace -> a timeline, to lay over the simulated one, and where its bubble is.

Stages of funcstage name what they do in traces of `torch.profiler`, as in "stage 2 I mb 5", so a trace tells
when each action of a step started and ended.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

from funcstage.schedules.costs import Costs
from funcstage.schedules.files import check_order
from funcstage.schedules.orders import Action, Kind, Order, ScheduleError
from funcstage.schedules.timeline import Span, Timeline

_RANGE = re.compile(r"stage (\d+) ([FIWB]) mb (\d+)(?:, piece (\d+) of (\d+))?")
_MICRO = 1e-6


class Wait(NamedTuple):
    """A part of the bubble: a rank that has nothing to do.

    Attributes:
        rank: which.
        start: when it began, in seconds from the start of the step.
        seconds: how long it took.
        before: what the rank did next; `None` at the end of the step.
        needs: what that waited for on another rank, the last of it to be done; `None` if all was there, so
            that the host or a message took the time.
        needs_until: when that was done.
    """

    rank: int
    start: float
    seconds: float
    before: Action | None
    needs: Action | None
    needs_until: float

    def __str__(self) -> str:
        if self.before is None:
            return "done before the others"
        if self.needs is None:
            return f"{self.before} could have run: the host or a message was late"
        return f"{self.before} needs {self.needs}"


def read_trace(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Timeline:
    """Read the last step of a pipeline from traces that `torch.profiler` has exported.

    Args:
        paths: a file for each rank, as `export_chrome_trace` or `tensorboard_trace_handler` writes it,
            gzipped or not, in the order of the ranks if the files do not say. Profile whole steps. If a file
            has times of a GPU, these count, otherwise the host's. The clocks of several hosts may differ.

    Returns:
        The timeline of the step. Its costs are medians over the microbatches; if a stage ran I and W
        together, `input` has both. Residuals are not in a trace, so none are held.

    Raises:
        ScheduleError: if a file is not such a trace, or has not all actions of a step.
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    pieces: set[int] = set()
    found = [_spans(Path(path), pieces) for path in files]
    by_rank = dict(enumerate(spans for _, spans in found))
    told = {rank: spans for rank, spans in found if rank is not None}
    if len(told) == len(found):
        by_rank = told
    ranks = [sorted(by_rank[rank], key=lambda span: span.start) for rank in sorted(by_rank)]
    first = min(span.start for spans in ranks for span in spans)
    actions = [span.action for spans in ranks for span in spans]
    order = Order(
        "measured",
        1 + max(action.stage for action in actions),
        1 + max(action.microbatch for action in actions),
        tuple(tuple(span.action for span in spans) for spans in ranks),
        max(pieces, default=1),
    )
    check_order(order)
    return Timeline(
        order,
        _costs([span for spans in ranks for span in spans], order.num_stages),
        0.0,
        tuple(array("d", (span.start - first for span in spans)) for spans in ranks),
        tuple(array("d", (span.end - first for span in spans)) for spans in ranks),
    )


def waits(timeline: Timeline) -> list[Wait]:
    """Return where the bubble of a timeline is, the longest waits first.

    Args:
        timeline: measured or simulated.
    """
    order = timeline.order
    ends = {
        done: (rank, span.end)
        for rank, spans in enumerate(timeline.ranks)
        for span in spans
        for done in span.action.gives()
    }
    found = []
    for rank, spans in enumerate(timeline.ranks):
        free = 0.0
        for action, start, end in spans:
            if start > free:
                needs = [(*ends[n], n) for n in action.needs(order.num_stages) if n not in action.gives()]
                late = [(until, n) for home, until, n in needs if home != rank and until > free]
                until, need = max(late, default=(free, None))
                found.append(Wait(rank, free, start - free, action, need, until))
            free = max(free, end)
        if timeline.makespan > free:
            found.append(Wait(rank, free, timeline.makespan - free, None, None, free))
    return sorted(found, key=lambda wait: -wait.seconds)


def _spans(path: Path, pieces: set[int]) -> tuple[int | None, list[Span]]:
    """The rank that a file tells, if it does, and the spans of its last step in seconds.

    Notes in how many pieces a W is.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            trace = json.load(file)
        events = trace["traceEvents"] if isinstance(trace, dict) else trace
        found = [(match, event) for event in events if (match := _RANGE.fullmatch(str(event.get("name"))))]
    except (ValueError, KeyError, AttributeError, gzip.BadGzipFile) as error:
        raise ScheduleError(
            f"{path} is not a trace in JSON. Pass a file that torch.profiler has exported "
            "(export_chrome_trace)."
        ) from error
    found = [(match, event) for match, event in found if event.get("ph") == "X"]
    device = [(m, event) for m, event in found if event.get("cat") == "gpu_user_annotation"]
    if not found:
        raise ScheduleError(
            f"{path} has no actions of a pipeline, such as 'stage 0 F mb 0'. Profile steps of "
            "FunctionalPipelineStage or pipeline_value_and_grad with torch.profiler, and export the trace."
        )
    about = trace if isinstance(trace, dict) else {}
    base = about.get("baseTimeNanoseconds", 0) * 1e-9
    runs: dict[tuple[Action, str | None], list[Span]] = defaultdict(list)
    for match, event in _of_the_busiest(device) or found:
        action = Action(cast(Kind, match[2]), int(match[1]), int(match[3]))
        start = base + event["ts"] * _MICRO
        runs[action, match[4]].append(Span(action, start, start + event["dur"] * _MICRO))
        if match[5]:
            pieces.add(int(match[5]))
    rank = about.get("distributedInfo", {}).get("rank")
    return rank, [max(spans, key=lambda span: span.start) for spans in runs.values()]


def _of_the_busiest(events: list[tuple[re.Match[str], dict[str, Any]]]) -> list[Any]:
    """The events of the stream that computes: a range is shown on each stream that it has launched to."""
    busy: dict[Any, float] = defaultdict(float)
    for _, event in events:
        busy[event.get("tid")] += event["dur"]
    return [one for one in events if one[1].get("tid") == max(busy, key=busy.__getitem__)]


def _costs(spans: Iterable[Span], num_stages: int) -> tuple[Costs, ...]:
    seconds: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for action, start, end in spans:  # of a W in pieces there are several
        seconds[action.stage, action.kind][action.microbatch] += end - start

    def of(stage: int, kind: str) -> float:
        return statistics.median(found.values()) if (found := seconds[stage, kind]) else 0.0

    return tuple(
        Costs(of(stage, "F"), of(stage, "I") or of(stage, "B"), of(stage, "W")) for stage in range(num_stages)
    )
