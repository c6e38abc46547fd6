"""Systems that take turns, so that whatever else a device does falls on all of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import TypeVar

from benchmarks.split import Clock, Phases, Stage, Times, forget_gradients, run, spread

Key = TypeVar("Key")
IN_A_ROW = 4


def in_turns(systems: Mapping[Key, tuple[Stage, Phases]], turns: int) -> dict[Key, Times]:
    """Time all systems in every turn, in a new order each time, as who was before sets a device's clocks.

    In its turn a system runs several times in a row, as microbatches follow each other. The first of them is
    not counted: the device waits there until the host has launched something.

    Args:
        systems: what they run. All stay compiled: raise Dynamo's `recompile_limit` where there are many.
        turns: after three that are not counted.
    """
    found = {key: Times([], [], []) for key in systems}
    order = random.Random(0)
    for turn in range(-3, turns):
        for key in order.sample([*systems], len(systems)):
            row = _row(*systems[key])
            if turn >= 0:
                found[key].totals.extend(row.totals)
                found[key].phases.extend(row.phases)
    return {key: times._replace(phases=[*zip(*times.phases, strict=True)]) for key, times in found.items()}


def _row(stage: Stage, phases: Phases) -> Times:
    """Milliseconds of each run in a row: in all, and of its phases."""
    clock = Clock(stage.x.device.type)
    clock.sync()
    marks = []
    for _ in range(1 + IN_A_ROW):
        forget_gradients(stage)
        marks.append([])
        result = run(phases, lambda _: marks[-1].append(clock.mark()))
        del result
    clock.sync()
    forget_gradients(stage)
    steps = [tuple(clock.between(a, b) for a, b in itertools.pairwise(each)) for each in marks[1:]]
    return Times([*map(sum, steps)], [], steps)


def spread_of(totals: list[float]) -> str:
    """The median ± half the distance of the quartiles."""
    found = spread(totals)
    low, high = found["total_quartiles_ms"]
    return f"{found['total_ms']:.3f} ± {(high - low) / 2:.3f}"
