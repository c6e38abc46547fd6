"""A training step in a pipeline of several GPUs as one CUDA graph: torch's stages and funcstage's, captured
alike.

    python -m benchmarks.captured --sizes M,L --microbatches 4,8
    python -m benchmarks.captured --ranks 4 --sizes M,L --microbatches 4,8,16

The model and the stages are those of `benchmarks.pipeline`; both are captured by
`funcstage.pipelining.captured`. Step times are medians by the host's clock around finished work, the slower
rank's; memory is what the allocator has reserved after the last step, with that which peers write messages
into, on the fuller rank. "Simulated" is as there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.pipeline import (
    FOUND,
    System,
    alone,
    batch,
    chosen,
    error_of,
    is_possible,
    order_of,
    ours,
    parser_of,
    placed,
    reference_gradients,
    save,
    schedule_of,
    seconds_between,
    size_of,
    start,
    step_of,
    theirs,
    theirs_compiled,
    told,
)
from funcstage.pipelining import Order, captured, simulate


class Contestant(NamedTuple):
    """A system, captured or as it is."""

    system: System
    captured: bool

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.system.name}{', captured' if self.captured else ''}"


@dataclass
class Result:
    """What was measured; times in milliseconds, memory in MiB."""

    system: str
    step_ms: float
    step_iqr_ms: float
    reserved_mib: float
    relative_error: float
    simulated_ms: float | None = None


def contestants() -> list[Contestant]:
    compiled = ours(backend="inductor")
    one = System("torch 1F1B, compiled", "1F1B", 1, theirs_compiled)
    interleaved = System("torch Interleaved1F1B, compiled", "Interleaved1F1B", 2, theirs_compiled)
    eager = System("torch ZBVZeroBubble, eager", "ZBVZeroBubble", 2, theirs)
    split = System("funcstage ZBVZeroBubble", "ZBVZeroBubble", 2, compiled)
    by_nccl = System("funcstage ZBVZeroBubble, NCCL", "ZBVZeroBubble", 2, ours("nccl", backend="inductor"))
    others = [
        System("funcstage InterleavedZeroBubble", "InterleavedZeroBubble", 2, compiled),
        System("funcstage DualPipeV", "DualPipeV", 2, compiled),
        System("funcstage, found", FOUND, 2, compiled),
    ]
    found = [Contestant(system, False) for system in (one, interleaved, by_nccl, split)]
    return found + [Contestant(system, True) for system in (one, interleaved, eager, by_nccl, split, *others)]


def measure(
    contestant: Contestant, size: Any, order: Order, repeats: int, device: torch.device, expected: Any
) -> Result:
    """Time a training step; every rank calls this."""
    system, world, n = contestant.system, dist.get_world_size(), order.num_stages
    modules = placed(system, size, order, device)
    stages = [system.stage(module, i, n, device) for i, module in modules]
    schedule = schedule_of(system, order, stages)
    runs = captured(schedule) if contestant.captured else schedule
    step = step_of(runs, modules, n, *batch(size, order.num_microbatches, device))
    for _ in range(6):
        step()
        torch.cuda.synchronize()
    error = error_of(modules, expected)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    quartiles = statistics.quantiles(times, n=4)
    routes = {stage.route for stage in stages if getattr(stage, "route", None) is not None}
    reserved = (torch.cuda.memory_reserved() + sum(route.memory.own.nbytes for route in routes)) / 2**20
    mine = Result(contestant.name, statistics.median(times), quartiles[2] - quartiles[0], reserved, error)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    mine.step_ms = max(each.step_ms for each in everyone)
    mine.reserved_mib = max(each.reserved_mib for each in everyone)
    if contestant.captured:
        if "not captured" in repr(runs):
            mine.system += f" ({runs!r})"
        runs.close()
    return mine


def table(results: list[Result]) -> str:
    lines = [
        "| system | step, ms | IQR | simulated, ms | reserved MiB | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        simulated = "" if r.simulated_ms is None else f"{r.simulated_ms:.2f}"
        lines.append(
            f"| {r.system} | {r.step_ms:.2f} | {r.step_iqr_ms:.2f} | {simulated} | {r.reserved_mib:.0f} "
            f"| {r.relative_error:.1e} |"
        )
    return "\n".join(lines)


def ratios(results: list[Result]) -> dict[str, float]:
    """The numbers that a run is made for."""
    by_name = {r.system: r for r in results}
    mine = by_name.get("funcstage ZBVZeroBubble, captured")
    if mine is None:
        return {}
    found: dict[str, float] = {}
    shipped = [r.step_ms for r in results if r.system.startswith("torch") and "captured" not in r.system]
    alike = [r.step_ms for r in results if r.system.startswith("torch") and r.system.endswith(", captured")]
    plain, one = by_name.get("funcstage ZBVZeroBubble"), by_name.get("torch 1F1B, compiled, captured")
    if shipped:
        found["captured / best of torch's as shipped"] = mine.step_ms / min(shipped)
    if alike:
        found["captured / best of torch's captured"] = mine.step_ms / min(alike)
    if plain is not None:
        found["captured / as it is"] = mine.step_ms / plain.step_ms
    if one is not None:
        found["reserved / torch's 1F1B captured"] = mine.reserved_mib / one.reserved_mib
    return found


def run_rank(rank: int, world: int, address: str, options: argparse.Namespace) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=world, device_id=device)
    warnings.filterwarnings("ignore", message=".*was traced for")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": []}
    for key in options.sizes.split(","):
        size = size_of(key, world)
        costs = alone(size, 2 * world, device) if rank == 0 else []
        comm = seconds_between(torch.randn(1, size.tokens, size.width, device=device, dtype=torch.bfloat16))
        for microbatches in map(int, options.microbatches.split(",")):
            expected = None
            if rank == 0:
                expected = reference_gradients(size, *batch(size, microbatches, device), microbatches)
            results = []
            for contestant in contestants():
                possible = is_possible(contestant.system, microbatches, world)
                if not (possible and chosen(contestant.name, options)):
                    continue
                torch._dynamo.reset()
                gc.collect()
                torch._C._cuda_clearCublasWorkspaces()  # of the contestants before
                torch.cuda.empty_cache()
                order = order_of(contestant.system, microbatches, costs, comm)
                results.append(measure(contestant, size, order, options.repeats, device, expected))
                if rank == 0 and contestant.system.name.startswith("funcstage"):
                    results[-1].simulated_ms = simulate(order, costs, comm=comm).makespan * 1e3
                if rank == 0:
                    print(f"{key} m={microbatches}: {results[-1]}", flush=True)
            if rank == 0:
                report["runs"].append(told(key, microbatches, results, table(results), ratios(results)))
    if rank == 0:
        save(report, options.json)
    dist.destroy_process_group()


def main() -> None:
    start(run_rank, parser_of(__doc__ or "", "M,L", 20).parse_args())


if __name__ == "__main__":
    main()
