"""The command: `python -m property_tests.mutation --help`."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .operators import OPERATORS, Mutant, mutants_of, sample
from .reach import Reach
from .targets import PACKAGE, ROOT, files_of_tests, target_files
from .trial import Outcome, collect, outcomes

NOTES = ROOT / "build" / "mutation.json"
Accepted = list[tuple[re.Pattern[str], str]]
ACCEPTED = Path(__file__).with_name("accepted.txt")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m property_tests.mutation", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants; all, if not given")
    parser.add_argument("--seed", type=int, default=0, help="for the sample")
    parser.add_argument("--only", default="", metavar="TEXT", help="try mutants whose name has TEXT")
    parser.add_argument(
        "--kinds", nargs="+", choices=OPERATORS, default=[*OPERATORS], help="of faults, all if not given"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--list", action="store_true", help="list the mutants, and try none")
    parser.add_argument(
        "--collect",
        nargs="?",
        const="",
        metavar="REGEX",
        help="note anew which tests run which lines, those in files whose name matches",
    )
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds for the tests of one file when they are noted"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which torch reads when it is imported
    mutants = [m for file in target_files() for m in mutants_of(file, (ROOT / file).read_text())]
    mutants = [m for m in mutants if options.only in m.name and m.kind in options.kinds]
    if options.sample is not None:
        mutants = sample(mutants, options.sample, options.seed)
    if options.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return
    if options.collect is not None or not NOTES.exists():
        note([file for file in files_of_tests() if re.search(options.collect or "", file)], options.limit)
    reach = Reach.load(NOTES)
    for file in reach.stale(ROOT):
        print(f"{file} has changed since it was noted which tests run its lines: --collect does it anew.")
    reach = reach.up_to_date(ROOT)
    accepted = read_accepted(ACCEPTED.read_text())
    found: list[Outcome] = []
    with suppress(KeyboardInterrupt):  # which ends it early
        for outcome in outcomes(mutants, ROOT / PACKAGE, reach, options.budget, options.jobs):
            found.append(outcome)
            reason = reason_for(outcome, accepted)
            status = "accepted" if reason else outcome.status
            print(f"{len(found):4} {status:9} {outcome.seconds:5.0f} s  {outcome.mutant.name}", flush=True)
            print(f"{'':24}{reason or outcome.said}", flush=True)
    print(table(found, accepted))


def note(tests: list[str], limit: float) -> None:
    """Note which lines the tests of some files run, and keep what is known of the others."""
    if not NOTES.exists():
        tests = files_of_tests()
    is_part = len(tests) < len(files_of_tests())  # now, as there may be more when they have run
    noted = NOTES.with_suffix(".new")
    collect(ROOT / PACKAGE, target_files(), tests, noted, limit)
    newer = Reach.load(noted)
    known = Reach.load(NOTES).up_to_date(ROOT) if is_part else newer
    known.joined(newer).save(NOTES)
    noted.unlink()


def read_accepted(text: str) -> Accepted:
    """Read which mutants are no faults: lines with names, then an indented one with the reason.

    `*` stands for any text.
    """
    found, names = [], []
    for line in text.splitlines():
        if line.startswith(" "):
            found += [(name, line.strip()) for name in names]
            names = []
        elif line and not line.startswith("#"):
            names.append(re.compile(re.escape(line).replace(r"\*", ".*")))
    return found


def reason_for(outcome: Outcome, accepted: Accepted) -> str | None:
    """Why a survivor is no fault."""
    survived = outcome.status in ("survived", "unreached")
    return next((why for name, why in accepted if survived and name.fullmatch(outcome.mutant.name)), None)


def table(found: Iterable[Outcome], accepted: Accepted) -> str:
    """The score of each file, and the survivors.

    What is accepted or unclear counts neither for nor against it.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    survivors: list[Mutant] = []
    for outcome in found:
        status = "accepted" if reason_for(outcome, accepted) else outcome.status
        for file in (outcome.mutant.file, "all"):
            counts[file][status] += 1
        if status in ("survived", "unreached"):
            survivors.append(outcome.mutant)
    columns = ("killed", "endless", "survived", "unreached", "accepted", "unclear")
    lines = [f"| file | {' | '.join(columns)} | score |", "| --- |" + " --- |" * (len(columns) + 1)]
    for file, count in sorted(counts.items(), key=lambda entry: (entry[0] == "all", entry[0])):
        tried = count.total() - count["accepted"] - count["unclear"]
        score = f"{(count['killed'] + count['endless']) / tried:.1%}" if tried else ""
        lines.append(f"| {file} | {' | '.join(str(count[c]) for c in columns)} | {score} |")
    return "\n".join([*lines, "", *(f"survived: {mutant.name}" for mutant in survivors)])


if __name__ == "__main__":
    main()
