"""Pullbacks that wait in host memory under a zero-bubble schedule: the memory that is free, and the time.

    python -m benchmarks.offload --size L

Four stages of two Llama-style blocks in one process on one device, as in `benchmarks.simulate`, with
`pipeline_value_and_grad(..., offload=)` and without, in turn. Peak memory is what the allocator gave out at a
time above what there is before the step; copied is what went to the host in a step, and came back.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.simulate import SIZES, STAGES, batch, stage
from benchmarks.split import Clock
from funcstage import away
from funcstage.pipelining import pipeline_order, pipeline_value_and_grad
from funcstage.pipelining.local import ValueAndGrad
from funcstage.pipelining.stays import Offloaded, stays_everywhere

OFFLOADED: tuple[Offloaded | None, ...] = (None, "W", "IW")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--schedules", default="ZBVZeroBubble,InterleavedZeroBubble")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| engine | schedule | offloaded | pullbacks | copied, MiB | step, ms (quartiles) | peak, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for engine in ("closures", "inductor" if options.device == "cuda" else "aten"):
        for schedule in options.schedules.split(","):
            report(engine, schedule, options)


def report(engine: str, schedule: str, options: argparse.Namespace) -> None:
    """Print a row with offloading, and one without."""
    size, count, device = SIZES[options.size], options.microbatches, options.device
    clock = Clock(device)
    stages = [stage(size, engine, device) for _ in range(STAGES)]
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    x, y = (batch(size, count, device) for _ in range(2))
    order = pipeline_order(schedule, STAGES, count)  # type: ignore[arg-type]
    runs = [
        Run(
            offload,
            pipeline_value_and_grad(
                stages, F.mse_loss, schedule=order, num_microbatches=count, offload=offload
            ),
        )
        for offload in OFFLOADED
    ]
    for turn in range(options.repeats + 1):
        for run in runs:
            clock.sync()
            gc.collect()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with run.moved:
                result = run.step(params, buffers, x, y)
            clock.sync()
            if turn:
                run.times.append((time.perf_counter() - start) * 1e3)
            if device == "cuda":
                run.peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            del result
    for run in runs:
        low, middle, high = statistics.quantiles(run.times, n=4)
        copied = run.moved.bytes / 2**20 / (options.repeats + 1)
        gone = len(stays_everywhere(order, run.offload).after)
        print(
            f"| {engine} | {schedule} | {run.offload or 'none'} | {gone} "
            f"| {copied:,.0f} | {middle:.1f} ({low:.1f} to {high:.1f}) | {run.peak:,.0f} |",
            flush=True,
        )


@dataclass
class Run:
    """A step, and what was measured of it."""

    offload: Offloaded | None
    step: ValueAndGrad
    times: list[float] = field(default_factory=list)
    peak: float = 0
    moved: Moved = field(default_factory=lambda: Moved())


class Moved:
    """Counts the bytes that are sent to the host meanwhile."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> None:
        self._sent = away._sent

        def sent(memory: torch.Tensor) -> torch.Tensor:
            self.bytes += memory.nbytes
            return self._sent(memory)

        away._sent = sent

    def __exit__(self, *error: object) -> None:
        away._sent = self._sent


if __name__ == "__main__":
    main()
