"""The bubble that each schedule leaves: built-in ones, ZB-H1 and what `find_schedule` finds.

    python -m benchmarks.schedules

F, I and W take as long as asked, equally by default, on as many ranks as asked and four microbatches a
rank; a schedule with two stages a rank has stages of half the length. Memory is the fullest rank's, in
microbatches of one rank's activations; I frees half of what F holds.
"""

from __future__ import annotations

import argparse
import time

from funcstage.pipelining import (
    Costs,
    Order,
    Timeline,
    find_schedule,
    pipeline_order,
    simulate,
    zero_bubble_h1,
)

MICROBATCHES = 4
"""A rank."""

HELD = 1000
"""Bytes that stand for a microbatch of one rank's activations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="4,8,16,64,512")
    parser.add_argument("--found", type=int, default=64, help="up to how many ranks a schedule is looked for")
    parser.add_argument("--costs", default="1,1,1", help="seconds of F, I and W of a rank")
    parser.add_argument("--comm", type=float, default=0.0, help="seconds between ranks")
    options = parser.parse_args()
    print("| ranks | microbatches | schedule | bubble | fullest rank | made in, s | simulated in, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for ranks in map(int, options.ranks.split(",")):
        seconds = tuple(map(float, options.costs.split(",")))
        rows(ranks, MICROBATCHES * ranks, seconds, options.comm, ranks <= options.found)


def rows(ranks: int, microbatches: int, seconds: tuple[float, ...], comm: float, found: bool) -> None:
    """Print a row for each schedule."""

    def find(costs: list[Costs], limit: int, pieces: int = 1) -> Order:
        return find_schedule(costs, ranks, microbatches, limit, comm=comm, pieces=pieces)

    f, i, w = seconds
    one = [Costs(f, i, w, HELD, HELD // 2)] * ranks
    two = [Costs(f / 2, i / 2, w / 2, HELD // 2, HELD // 4)] * 2 * ranks
    cases = [
        ("1F1B", lambda: pipeline_order("1F1B", ranks, microbatches), one),
        ("ZB-H1", lambda: zero_bubble_h1(ranks, microbatches), one),
        ("ZB-V", lambda: pipeline_order("ZBVZeroBubble", 2 * ranks, microbatches), two),
        ("DualPipeV", lambda: pipeline_order("DualPipeV", 2 * ranks, microbatches), two),
    ]
    if found:
        cases += [
            ("found, 1F1B's memory", lambda: find(one, ranks * HELD), one),
            ("found, twice that", lambda: find(one, 2 * ranks * HELD), one),
            ("found, two stages a rank", lambda: find(two, ranks * HELD), two),
            ("found, two stages a rank, W in two pieces", lambda: find(two, ranks * HELD, 2), two),
            ("found, two stages a rank, W in four pieces", lambda: find(two, ranks * HELD, 4), two),
        ]
    for name, make, costs in cases:
        start = time.perf_counter()
        order: Order = make()
        made = time.perf_counter()
        timeline: Timeline = simulate(order, costs, comm=comm)
        done = time.perf_counter()
        print(
            f"| {ranks} | {microbatches} | {name} | {timeline.bubble_fraction:.1%} "
            f"| {max(timeline.peak_memory) / HELD:.1f} | {made - start:.1f} | {done - made:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
