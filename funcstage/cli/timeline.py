"""`funcstage timeline`: a schedule on a clock, as numbers, a picture, a trace or torch's file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from funcstage.cli import files, measured, show
from funcstage.errors import StageError
from funcstage.pipelining import (
    SCHEDULES,
    Costs,
    Order,
    Timeline,
    find_schedule,
    pipeline_order,
    read_order,
    simulate,
    zero_bubble_h1,
)

_TWO_STAGES = ("ZBVZeroBubble", "DualPipeV", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
_ZB_H1, _FOUND = "ZB-H1", "found"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "timeline",
        help="simulate a schedule, and draw it",
        description=(
            "Put a pipeline schedule on a clock. Costs are those of a rank; with two stages a rank each has "
            "half of them."
        ),
        epilog=(
            "For example: funcstage timeline --schedule ZBVZeroBubble --ranks 8 --microbatches 16 "
            "-o timeline.png"
        ),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--schedule",
        default="ZBVZeroBubble",
        choices=(*SCHEDULES, _ZB_H1, _FOUND),
        metavar="NAME",
        help=f"%(choices)s; '{_FOUND}' is what find_schedule finds for the costs (default: %(default)s)",
    )
    which.add_argument(
        "--trace",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a measured step: a trace of torch.profiler for each rank, laid over the simulated step",
    )
    which.add_argument("--csv", type=Path, metavar="FILE", help="a schedule's file, as torch writes them")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="devices (default: %(default)s)")
    parser.add_argument(
        "--microbatches", type=int, default=8, metavar="N", help="microbatches a step (default: %(default)s)"
    )
    parser.add_argument(
        "--stages-per-rank",
        type=int,
        choices=(1, 2),
        help=f"default: 2 for schedules of several, else 1; '{_FOUND}' tries both",
    )
    parser.add_argument(
        "--costs",
        type=float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        metavar=("F", "I", "W"),
        help="seconds that a rank takes for a microbatch (default: 1 1 1)",
    )
    parser.add_argument(
        "--held",
        type=_bytes,
        nargs=2,
        default=(2, 1),
        metavar=("AFTER_F", "AFTER_I"),
        help="bytes of residuals that a rank holds for a microbatch (default: 2 1)",
    )
    parser.add_argument(
        "--comm", type=float, default=0.0, metavar="S", help="seconds between ranks (default: 0)"
    )
    parser.add_argument(
        "--memory-limit", type=_bytes, metavar="BYTES", help=f"of a rank, with --schedule {_FOUND}"
    )
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help=".png, .svg or .pdf: a picture; .html: one to zoom into; .json: a trace for Perfetto; .csv: for "
        "torch; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, write the files, print the numbers."""
    _check(arguments)
    if arguments.trace is not None:
        return measured.run(arguments)
    with show.working("simulating"):
        order, costs = _order(arguments)
        timeline = simulate(order, costs, comm=arguments.comm)
    files.write([timeline], arguments.output)
    if arguments.json:
        print(json.dumps(_as_json(timeline), indent=1))
    else:
        header, *rows = timeline.rows()
        show.table(str(timeline), header, rows)
        for note in _notes(arguments, timeline):
            print(f"note: {note}")
        for path in arguments.output:
            print(f"written: {path}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for option, count in (("--ranks", arguments.ranks), ("--microbatches", arguments.microbatches)):
        if count < 1:
            raise StageError(f"{option} must be 1 or more, got {count}.")
    numbers = (("--costs", arguments.costs), ("--held", arguments.held), ("--comm", (arguments.comm,)))
    for option, values in numbers:
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise StageError(f"{option} must be finite and not negative, got {value}.")
    for path in arguments.output:
        if not path.parent.is_dir():
            raise StageError(f"-o {path}: there is no folder {path.parent}.")


def _notes(arguments: argparse.Namespace, timeline: Timeline) -> list[str]:
    """What was left out of a search."""
    if arguments.csv is not None or arguments.schedule != _FOUND:
        return []
    notes = []
    if arguments.stages_per_rank is not None:
        stages = "one stage" if arguments.stages_per_rank == 1 else "two stages"
        notes.append(f"only orders with {stages} a rank were searched; leave out --stages-per-rank for all.")
    if importlib.util.find_spec("scipy") is None:
        notes.append(
            "scipy is not installed, so there was no integer programming: pip install 'funcstage[schedules]'."
        )
    return notes


def _order(arguments: argparse.Namespace) -> tuple[Order, list[Costs]]:
    ranks, microbatches = arguments.ranks, arguments.microbatches
    if arguments.csv is not None:
        try:
            order = read_order(arguments.csv)
        except OSError as error:
            raise StageError(f"--csv {arguments.csv} cannot be read: {error.strerror}.") from error
        share = len(order.stages_of(0))
        return order, _costs(arguments, order.num_stages, share)
    if arguments.schedule == _FOUND:
        return _found(arguments)
    share = arguments.stages_per_rank or (2 if arguments.schedule in _TWO_STAGES else 1)
    costs = _costs(arguments, ranks * share, share)
    if arguments.memory_limit is not None:
        raise StageError(
            f"--memory-limit goes with --schedule {_FOUND} alone: {arguments.schedule} is one fixed order."
        )
    if arguments.schedule == _ZB_H1:
        return zero_bubble_h1(ranks, microbatches), costs
    return pipeline_order(arguments.schedule, ranks * share, microbatches, num_ranks=ranks), costs


def _found(arguments: argparse.Namespace) -> tuple[Order, list[Costs]]:
    """The fastest order of those found for one stage a rank and for two."""
    ranks, comm = arguments.ranks, arguments.comm
    shares = (arguments.stages_per_rank,) if arguments.stages_per_rank else (1, 2)
    found: list[tuple[float, Order, list[Costs]]] = []
    refusals: list[StageError] = []
    for share in shares:
        costs = _costs(arguments, ranks * share, share)
        try:
            order = find_schedule(costs, ranks, arguments.microbatches, arguments.memory_limit, comm=comm)
        except StageError as refusal:  # no order of so many stages is within the limit
            refusals.append(refusal)
        else:
            found.append((simulate(order, costs, comm=comm).makespan, order, costs))
    if not found:
        raise refusals[-1]
    _, order, costs = min(found, key=lambda one: one[0])
    return order, costs


def _costs(arguments: argparse.Namespace, num_stages: int, share: int) -> list[Costs]:
    seconds = [cost / share for cost in arguments.costs]
    held = [size / share if size % share else size // share for size in arguments.held]
    return [Costs(*seconds, *held)] * num_stages


def _bytes(text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a number of bytes, such as 2e9, got {text!r}") from None


def _as_json(timeline: Timeline) -> dict[str, Any]:
    order = timeline.order
    return {
        "schedule": order.schedule,
        "ranks": order.num_ranks,
        "stages": order.num_stages,
        "microbatches": order.num_microbatches,
        "seconds": timeline.makespan,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_memory": timeline.peak_memory,
        "critical_path": [str(span.action) for span in timeline.critical_path()],
    }
