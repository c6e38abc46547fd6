"""`funcstage plan`: what F, I and W of a stage cost, before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import suppress
from typing import Any

from funcstage.cli import show, target
from funcstage.engines.graph.compile import compile
from funcstage.engines.graph.plan import Phase, Plan


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="FLOPs and residuals of a stage's three programs",
        description=(
            "Trace a stage and say what F, I and W compute and hold. The stage's tensors may be on the meta "
            "device, so that a stage of any size is planned on any machine."
        ),
    )
    parser.add_argument("stage", help="package.module:factory, which returns (module, *arguments)")
    parser.add_argument(
        "--remat",
        default="min_cut",
        type=_remat,
        metavar="{none,min_cut,full,0.0 to 1.0}",
        help="what backward recomputes, or a budget of bytes that F hands on (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    target.add_traceback(parser)
    parser.set_defaults(command=run)


def _remat(given: str) -> Any:
    """What `--remat` says: a name, or a budget."""
    if given in ("none", "min_cut", "full"):
        return given
    with suppress(ValueError):
        if 0 <= float(given) <= 1:
            return float(given)
    raise argparse.ArgumentTypeError(f"must be none, min_cut, full or a number from 0 to 1, got {given!r}")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    found = target.load(arguments)
    apply, params, buffers = found.functional
    with show.working("tracing"), found.errors(arguments):
        plan = compile(apply, backend="aten", remat=arguments.remat).plan(params, buffers, *found.args)
    if arguments.json:
        values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
        phases = {name: value._asdict() for name, value in values.items() if isinstance(value, Phase)}
        print(json.dumps(values | phases, indent=1))
    else:
        _print(plan)
    return 0


def _print(plan: Plan) -> None:
    header, *rows = plan.rows()
    show.table(plan.stage, header, rows)
    show.table("residuals", ("", "size"), plan.edges())
