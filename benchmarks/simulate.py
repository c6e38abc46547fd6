"""Is a simulated step as long as a real one? In one process, where a step takes what all actions take in sum.

    python -m benchmarks.simulate --sizes L
    python -m benchmarks.simulate --device cpu --sizes S

Four stages of two Llama-style blocks, mean-squared loss, under `pipeline_value_and_grad`. Costs are those of
`measure_costs`; simulated is the `busy` time of the schedule's timeline, measured the median step by the
host's clock around finished work. `benchmarks.pipeline` does the same for two devices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcstage as fs
from benchmarks.split import Block, Clock, Size
from funcstage.pipelining import measure_costs, pipeline_order, pipeline_value_and_grad, simulate

SIZES = {"L": Size(4096, 11008, 8, 1, 4096, 32), "S": Size(256, 704, 8, 1, 256, 4)}
STAGES = 4
SCHEDULES = ("GPipe", "1F1B", "ZBVZeroBubble")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="L")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| size | engine | schedule | simulated, ms | measured, ms (quartiles) | simulated / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes.split(","):
        for engine in ("closures", "inductor" if options.device == "cuda" else "aten"):
            report(size, engine, options)


def report(size: str, engine: str, options: argparse.Namespace) -> None:
    """Print a row for each schedule."""
    clock = Clock(options.device)
    stages = [stage(SIZES[size], engine, options.device) for _ in range(STAGES)]
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    x, y = (batch(SIZES[size], options.microbatches, options.device) for _ in range(2))
    costs = measure_costs(stages, F.mse_loss, x[:1], y[:1], repeats=options.repeats)
    for schedule in SCHEDULES:
        order = pipeline_order(schedule, STAGES, options.microbatches)
        simulated = simulate(order, costs).busy * 1e3
        step = pipeline_value_and_grad(
            stages, F.mse_loss, schedule=schedule, num_microbatches=options.microbatches
        )
        times = []
        for _ in range(options.repeats + 1):
            clock.sync()
            start = time.perf_counter()
            result: Any = step(params, buffers, x, y)
            clock.sync()
            times.append((time.perf_counter() - start) * 1e3)
            del result
        low, measured, high = statistics.quantiles(times[1:], n=4)
        print(
            f"| {size} | {engine} | {schedule} | {simulated:.1f} | {measured:.1f} ({low:.1f} to {high:.1f}) "
            f"| {simulated / measured:.3f} |",
            flush=True,
        )


def stage(size: Size, engine: str, device: str) -> Any:
    body = nn.Sequential(*(Block(size) for _ in range(size.layers // STAGES)))
    made = fs.functionalize(body.to(device, dtype(device)))
    return made if engine == "closures" else made._replace(apply=fs.compile(made.apply, backend=engine))


def batch(size: Size, microbatches: int, device: str) -> Tensor:
    return torch.randn(microbatches, size.tokens, size.width, device=device, dtype=dtype(device))


def dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


if __name__ == "__main__":
    main()
