"""`funcstage check`: is the split of this stage what eager backward gives?"""

from __future__ import annotations

import argparse
import json
from typing import Any

from funcstage import report as tables
from funcstage.cli import show, target
from funcstage.errors import StageError
from funcstage.testing import EngineReport, StageMismatch, StageReport, check_stage

_ENGINES = ("closures", "aten", "inductor")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "check",
        help="compare a stage's split with plain eager backward",
        description=(
            "Run funcstage.testing.check_stage on a stage: values, gradients, buffers, purity and FLOPs of "
            "each engine against plain eager backward. Exits with 1 if anything differs."
        ),
    )
    parser.add_argument("stage", help="package.module:factory, which returns (module, *arguments)")
    parser.add_argument(
        "--engine",
        dest="engines",
        action="append",
        choices=_ENGINES,
        help="one of the engines; may be repeated (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random numbers (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    target.add_traceback(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found and return the exit status."""
    found = target.load(arguments)
    engines = arguments.engines or _ENGINES
    report: StageReport | None = None
    refusals: dict[str, StageError] = {}
    for engine in show.progress(engines, "checking"):
        try:
            with found.errors(arguments):
                checked = check_stage(found.stage, *found.args, engines=engine, seed=arguments.seed)
        except StageMismatch as mismatch:
            checked = mismatch.report
        except StageError as refusal:
            refusals[engine] = refusal
            continue
        report = report or StageReport(checked.stage)
        report.engines |= checked.engines
    if report is None:
        raise next(iter(refusals.values()))
    for engine, error in refusals.items():
        report.engines[engine] = EngineReport(engine, refusal=error)
    if arguments.json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        _print(report)
    return 1 if report.complaints() else 0


def _as_json(report: StageReport) -> dict[str, Any]:
    return {
        "stage": report.stage,
        "equal": not report.complaints(),
        "engines": {
            name: {
                "refusal": None if engine.refusal is None else str(engine.refusal),
                "leaves": len(engine.leaves),
                "exact": engine.exact,
                "largest_relative_error": engine.worst.relative if engine.worst else None,
                "flops": None if engine.flops is None else engine.flops._asdict(),
                "bytes_before_input_grad": engine.input_nbytes,
                "bytes_before_weight_grad": engine.weight_nbytes,
                "complaints": engine.complaints(),
                "notes": engine.notes,
            }
            for name, engine in report.engines.items()
        },
    }


def _print(report: StageReport) -> None:
    header = (
        "engine",
        "verdict",
        "bitwise",
        "FLOP: F + I + W",
        "eager",
        "before I",
        "before W",
    )
    rows = []
    for name, engine in report.engines.items():
        if engine.refusal is not None:
            rows.append((name, "error", *[""] * 5))
            continue
        flops = engine.flops
        rows.append(
            (
                name,
                "differs" if engine.complaints() else "equal",
                f"{engine.exact} of {len(engine.leaves)}",
                ""
                if flops is None
                else " + ".join(tables.work(n, "") for n in (flops.forward, flops.input, flops.weight)),
                "" if flops is None else tables.work(flops.eager_forward + flops.eager_backward, ""),
                tables.size(engine.input_nbytes),
                tables.size(engine.weight_nbytes),
            )
        )
    show.table(report.stage, header, rows)
    for name, refusal in report.refusals.items():
        print(f"{name}: {refusal}")
    for name, engine in report.engines.items():
        for note in engine.notes:
            print(f"{name}: note: {note}")
    for complaint in report.complaints():
        print(complaint)
