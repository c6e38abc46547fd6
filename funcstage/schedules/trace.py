"""Timelines for Perfetto (https://ui.perfetto.dev) and chrome://tracing, in the Trace Event Format."""

from __future__ import annotations

import json
import os
from typing import Any

from funcstage.schedules.timeline import Timeline


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Make a trace of a timeline: a process for each rank, with its actions and the bytes that it holds.

    Args:
        timeline: from `simulate`.

    Returns:
        What becomes JSON; its times are microseconds, as the format wants them.
    """
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for action, start, end in spans:
            events.append(
                {
                    "ph": "X",
                    "name": str(action),
                    "cat": action.kind,
                    "pid": rank,
                    "tid": 0,
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"stage": action.stage, "microbatch": action.microbatch},
                }
            )
        for seconds, held in timeline.memory(rank):
            event = {"ph": "C", "name": "residuals", "pid": rank, "ts": seconds * 1e6}
            events.append({**event, "args": {"bytes": held}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write `chrome_trace` of a timeline as JSON.

    Args:
        timeline: from `simulate`.
        path: the file.
    """
    with open(path, "w") as file:
        json.dump(chrome_trace(timeline), file)
