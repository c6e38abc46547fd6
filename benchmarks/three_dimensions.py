"""A training step of a pipeline of stages that are sharded twice, PP x FSDP x TP: torch's and funcstage's.

    torchrun --nproc-per-node 8 -m benchmarks.three_dimensions
    torchrun --nproc-per-node 4 -m benchmarks.three_dimensions --mesh 2,2,1
    torchrun --nproc-per-node 8 -m benchmarks.three_dimensions --device cpu --size XS --repeats 3

Llama-style blocks in bfloat16, eight of them or two for each rank of the pipeline if that is more, two stages
a rank, one sequence a microbatch and data rank, mean-squared loss. Every block's weights are split by columns
and rows over the last dimension of the mesh, and what is left of them over the middle one. Under torch's
stages the blocks are compiled one by one, or not at all; funcstage compiles the stages. The columns:

- step: milliseconds, medians by the host's clock around finished work; after ± half the quartiles' distance.
- peak: MiB of the fullest rank; empty on a CPU.
- error: the largest `||gradient - torch's, eager|| / ||torch's, eager||` of all parameters' shards.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.pipeline import SIZES, loss_fn, size_of, step_of
from benchmarks.sharded import Block, join, leave, local, most, reduce_by_sums, split_weights
from benchmarks.split import MIB, Clock, Size, relative_error
from funcstage.pipelining import FunctionalPipelineStage, pipeline_order


class System(NamedTuple):
    """A kind of stage under a schedule.

    Attributes:
        name: for the table.
        schedule: torch's name of it.
        compiled: whether blocks are compiled before they are sharded.
        stage: makes a stage of (module, index, number of stages, device, group).
    """

    name: str
    schedule: str
    compiled: bool
    stage: Callable[[nn.Module, int, int, torch.device, Any], Any]


def theirs(module: nn.Module, index: int, n: int, device: torch.device, group: Any) -> PipelineStage:
    return PipelineStage(module, index, n, device, group=group)


def ours(module: nn.Module, index: int, n: int, device: torch.device, group: Any) -> FunctionalPipelineStage:
    backend = "inductor" if device.type == "cuda" else "aten"
    return FunctionalPipelineStage(module, index, n, device, group=group, compile={"backend": backend})


SYSTEMS = (
    System("torch Interleaved1F1B, eager", "Interleaved1F1B", False, theirs),
    System("torch Interleaved1F1B, compiled", "Interleaved1F1B", True, theirs),
    System("funcstage Interleaved1F1B", "Interleaved1F1B", False, ours),
    System("funcstage InterleavedZeroBubble", "InterleavedZeroBubble", False, ours),
    System("funcstage ZBVZeroBubble", "ZBVZeroBubble", False, ours),
)


@dataclass
class Result:
    """What was measured of one system."""

    system: str
    step_ms: float
    half_quartiles_ms: float
    peak_mib: float | None
    relative_error: float


def part(size: Size, of: range, mesh: DeviceMesh, compiled: bool) -> nn.Module:
    """Some of the model's blocks, the same numbers in all systems, sharded over the mesh within a stage."""
    made = []
    for i in of:
        torch.manual_seed(i)
        with torch.device(mesh.device_type):  # where numbers are drawn in no time
            made.append(Block(size))
    module = nn.Sequential(*made).to(mesh.device_type, torch.bfloat16)
    for block in module:
        if mesh["tensor"].size() > 1:
            split_weights(block, mesh["tensor"])
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=False)
    fully_shard(module, mesh=mesh["data"], reshard_after_forward=False)
    reduce_by_sums(module, mesh)
    return module


def measure(
    system: System, size: Size, microbatches: int, mesh: DeviceMesh, repeats: int
) -> tuple[Result, dict[str, Tensor]]:
    """Time a training step of one system, and return this rank's gradients; every rank calls this."""
    clock = Clock(mesh.device_type)
    pipeline = mesh["pipeline"]
    n = 2 * pipeline.size()
    device = torch.device(mesh.device_type, torch.cuda.current_device() if clock.cuda else None)
    order = pipeline_order(system.schedule, n, microbatches, num_ranks=pipeline.size())
    mine = order.stages_of(pipeline.get_local_rank())
    each = size.layers // n
    parts = {i: part(size, range(i * each, (i + 1) * each), mesh, system.compiled) for i in mine}
    stages = [system.stage(module, i, n, device, pipeline.get_group()) for i, module in parts.items()]
    kind: Any = get_schedule_class(system.schedule)
    schedule = kind(stages, microbatches, loss_fn=loss_fn)
    torch.manual_seed(100 + mesh["data"].get_local_rank())
    shape = (microbatches * size.batch, size.tokens, size.width)
    x, target = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))

    step = step_of(schedule, list(parts.items()), n, x, target)
    for _ in range(3):
        step()
    clock.sync()
    grads = {
        f"{i}.{name}": local(parameter.grad).clone()
        for i, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        clock.sync()
        dist.barrier()
        start = time.perf_counter()
        step()
        clock.sync()
        times.append((time.perf_counter() - start) * 1e3)
    low, _, high = statistics.quantiles(times, n=4)
    result = Result(
        system.name,
        most(statistics.median(times)) or 0.0,
        most((high - low) / 2) or 0.0,
        most(torch.cuda.max_memory_allocated() / MIB if clock.cuda else None),
        0.0,
    )
    return result, grads


def compare(size: Size, microbatches: int, mesh: DeviceMesh, repeats: int) -> list[Result]:
    """Measure all systems, whose stages may lie on other ranks under other schedules."""
    found = []
    expected: dict[str, Tensor] = {}
    for system in SYSTEMS:
        result, grads = measure(system, size, microbatches, mesh, repeats)
        expected = expected or grads
        errors = [relative_error([grads[k]], [expected[k].double()]) for k in grads.keys() & expected.keys()]
        result.relative_error = most(max(errors, default=0.0)) or 0.0
        found.append(result)
        if dist.get_rank() == 0:
            print(result, file=sys.stderr, flush=True)  # what follows may fail, or outlast its time
        gc.collect()
        torch.compiler.reset()
        if mesh.device_type == "cuda":
            torch.cuda.empty_cache()
    return found


def table(results: list[Result]) -> str:
    rows = ["| system | step | peak | error |", "| --- | --- | --- | --- |"]
    for r in results:
        peak = "" if r.peak_mib is None else f"{r.peak_mib:,.0f}"
        rows.append(
            f"| {r.system} | {r.step_ms:.1f} ± {r.half_quartiles_ms:.1f} | {peak} | {r.relative_error:.1e} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="L", choices=SIZES)
    parser.add_argument("--mesh", default="2,2,2", help="ranks of the pipeline, of FSDP and of TP")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    join(options.device)
    sizes = tuple(map(int, options.mesh.split(",")))
    mesh = init_device_mesh(options.device, sizes, mesh_dim_names=("pipeline", "data", "tensor"))
    results = compare(size_of(options.size, sizes[0]), options.microbatches, mesh, options.repeats)
    leave(results, table(results), options.json)


if __name__ == "__main__":
    main()
