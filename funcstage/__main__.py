"""`funcstage`, or `python -m funcstage`: the command line."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from funcstage import __version__
from funcstage.cli import check, plan, timeline
from funcstage.demo.distributed import RANK, WORLD_SIZE
from funcstage.errors import StageError
from funcstage.pipelining import SCHEDULES, ScheduleError


def console() -> int:
    """Run the command line as the script `funcstage`, which finds stages in the working directory too."""
    sys.path.insert(0, "")
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments) or 0)
    except StageError as refusal:
        # Under torchrun, what all ranks refuse alike is said once.
        if RANK == 0 or not isinstance(refusal, ScheduleError):
            print(f"funcstage: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    script = "funcstage" if Path(sys.argv[0]).stem == "funcstage" else "python -m funcstage"
    parser = argparse.ArgumentParser(
        prog=script,
        description="The split backward of a pipeline stage, as a function transformation, in PyTorch.",
        epilog=f"Help on a command: {script} demo --help",
    )
    parser.add_argument(
        "--version", action="version", version=f"funcstage {__version__}, torch {torch.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a small language model as a pipeline in one process, and show its schedule",
        description=(
            "Train a byte-level transformer on the source code of Python's standard library, cut into "
            "stages that run under one of torch's pipeline schedules in this one process. Checks a step's "
            "gradients against plain eager backward first; ends with what F, I and W of each stage cost, "
            "the bubble of the schedule against 1F1B, and a picture of a step. About 90 seconds on a CPU. "
            "Started by torchrun, each process is a rank of the schedule."
        ),
        epilog=(
            f"A quick look: {script} demo --steps 5. "
            "In two processes: torchrun --nproc-per-node=2 -m funcstage demo"
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--device", default="cpu", help="torch device to train on, such as cpu or cuda")
    demo.add_argument(
        "--schedule",
        default="ZBVZeroBubble",
        choices=SCHEDULES,
        metavar="NAME",
        help="%(choices)s (default: %(default)s)",
    )
    demo.add_argument("--steps", default=150, type=_positive, metavar="N", help="training steps")
    demo.add_argument(
        "--stages",
        default=2 * max(2, WORLD_SIZE),
        type=_positive,
        metavar="N",
        help="stages that the model is cut into",
    )
    demo.add_argument("--microbatches", default=8, type=_positive, metavar="N", help="microbatches a step")
    demo.add_argument("--seed", default=0, type=int, metavar="N", help="seed of text order, batches, weights")
    demo.add_argument(
        "-o", "--output", default=Path("timeline.png"), type=Path, metavar="FILE", help="picture to write"
    )
    demo.add_argument(
        "--scalars",
        default=Path("runs"),
        type=Path,
        metavar="FOLDER",
        help="where the scalars of each step go, if tensorboard is installed",
    )
    demo.set_defaults(command=_demo)
    for command in (plan, check, timeline):
        command.add(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise StageError(
            f"The demo needs {' and '.join(missing)}, not installed here: pip install 'funcstage[demo]'."
        )
    if not arguments.output.parent.is_dir():
        raise StageError(f"-o {arguments.output}: there is no folder {arguments.output.parent}.")
    from funcstage.demo import run  # needs the extra

    settings = {name: getattr(arguments, name) for name in run.Settings._fields}
    run.run(run.Settings(**settings))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
