"""`funcstage timeline --trace`: a measured step laid over the simulated one, and where its bubble is."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from funcstage.cli import files, show
from funcstage.errors import StageError
from funcstage.pipelining import Timeline, read_trace, simulate, waits

_SHOWN = 10  # of the waits, the longest


def run(arguments: argparse.Namespace) -> int:
    """Read the traces, simulate the same order with the medians of its times, and print where they part."""
    try:
        step = read_trace(arguments.trace)
    except OSError as error:
        raise StageError(f"--trace {error.filename} cannot be read: {error.strerror}.") from error
    simulated = simulate(replace(step.order, schedule="simulated"), step.costs, comm=arguments.comm)
    files.write([step, simulated], arguments.output)
    if arguments.json:
        print(json.dumps(_as_json(step, simulated), indent=1))
        return 0
    rows = [
        (*measured[:4], expected[3])
        for measured, expected in zip(step.rows()[1:], simulated.rows()[1:], strict=True)
    ]
    show.table(str(step), ("rank", "stages", "busy", "idle", "simulated"), rows)
    print(f"{simulated}, with the medians of these times")
    bubble = [
        (str(wait.rank), _time(wait.start), _time(wait.seconds), str(wait)) for wait in waits(step)[:_SHOWN]
    ]
    if bubble:
        show.table("where the bubble is", ("rank", "from", "for", "because"), bubble)
    for path in arguments.output:
        print(f"written: {path}")
    return 0


def _time(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def _as_json(step: Timeline, simulated: Timeline) -> dict[str, object]:
    return {
        "seconds": step.makespan,
        "bubble_fraction": step.bubble_fraction,
        "simulated_seconds": simulated.makespan,
        "simulated_bubble_fraction": simulated.bubble_fraction,
        "waits": [
            {
                "rank": wait.rank,
                "start": wait.start,
                "seconds": wait.seconds,
                "before": None if wait.before is None else str(wait.before),
                "needs": None if wait.needs is None else str(wait.needs),
            }
            for wait in waits(step)
        ],
    }
