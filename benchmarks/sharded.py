"""One sharded stage, F + I + W: eager, `torch.compile` and funcstage, by tensor parallelism and by FSDP2.

    torchrun --nproc-per-node 2 -m benchmarks.sharded
    torchrun --nproc-per-node 2 -m benchmarks.sharded --device cpu --size XS --repeats 3

Llama-style blocks in bfloat16, split over all ranks: columns and rows of the weights ("tensor"), or each
block's parameters and the gradients' sums ("fsdp"; `torch.compile` is given the blocks, funcstage the whole).
What the columns say, for the slowest or fullest rank:

- total: milliseconds of F and the whole backward, medians; after ± half the distance of the quartiles.
- held after F: MiB without the output; on a CPU what the pullback says.
- exposed: milliseconds in which a device only communicates, from a profile of one run; empty on a CPU.
- error: the largest `||gradient - eager's|| / ||eager's||` of all gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

import funcstage as fs
from benchmarks.split import (
    MIB,
    SIZES,
    Clock,
    Phases,
    Size,
    Stage,
    autograd_phases,
    funcstage_phases,
    relative_error,
    run,
)


class Block(nn.Module):
    """A block that works with as many heads as its weights have."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head = size.width // size.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.q, self.k, self.v, self.project = (
            nn.Linear(size.width, size.width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (
            part(normed).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("project", "down")


def split_weights(block: nn.Module, mesh: DeviceMesh) -> None:
    """Split a block's weights by columns and rows."""
    plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS}
    parallelize_module(block, mesh, plan | {name: RowwiseParallel() for name in ROWS})


def reduce_by_sums(module: nn.Module, mesh: DeviceMesh) -> None:
    """Have FSDP sum and scale on a CPU, as gloo has no means."""
    for part in module.modules() if mesh.device_type == "cpu" else ():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)


def stage_of(size: Size, layout: str, mesh: DeviceMesh, compiled: bool) -> Stage:
    """The same numbers in all systems; under FSDP each rank has rows of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Block(size) for _ in range(size.layers))).to(mesh.device_type, torch.bfloat16)
    if layout == "tensor":
        for block in module:
            split_weights(block, mesh)
        if compiled:
            module.compile()
    else:
        for block in module:
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        reduce_by_sums(module, mesh)
    torch.manual_seed(1 + (dist.get_rank() if layout == "fsdp" else 0))
    x = torch.randn(size.batch, size.tokens, size.width, device=mesh.device_type, dtype=torch.bfloat16)
    return Stage(module, x, torch.randn_like(x))


def monolithic(stage: Stage) -> Phases:
    return autograd_phases(stage, stage.module)


def at_once(stage: Stage, **options: Any) -> Phases:
    """F, and I and W as one action."""
    forward, *_ = funcstage_phases(stage, **options)

    def backward(state: Any) -> tuple[Tensor, list[Tensor]]:
        (dx,), grads = fs.stage_backward(state[1], stage.cotangent)
        return dx, list(grads.values())

    return forward, backward


@dataclass
class Result:
    """What was measured of one system under one layout; `None` where it cannot be seen."""

    layout: str
    system: str
    total_ms: float
    half_quartiles_ms: float
    held_after_forward_mib: float | None
    exposed_ms: float | None
    relative_error: float


def measure(stage: Stage, phases: Phases, repeats: int) -> tuple[list[float], float | None, float | None]:
    """The milliseconds of some runs, the MiB that F leaves, and the exposed milliseconds of one."""
    clock = Clock(stage.x.device.type)
    for _ in range(3):
        run(phases)
    totals = []
    for _ in range(repeats):
        forget(stage)
        clock.sync()
        dist.barrier()
        start = clock.mark()
        run(phases)
        end = clock.mark()
        clock.sync()
        totals.append(clock.between(start, end))
    forget(stage)
    gc.collect()
    held = held_after_forward(stage, phases)
    if not clock.cuda:
        return totals, held, None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run(phases)
        clock.sync()
    return totals, held, exposed_ms(profiled.events())


def held_after_forward(stage: Stage, phases: Phases) -> float | None:
    if stage.x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    state: Any = phases[0]()
    output, rest = state
    if stage.x.is_cuda:
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    else:
        held = rest.nbytes if isinstance(rest, fs.Pullback) else None
    del output, rest
    for phase in phases[1:]:
        state = phase(state)
    return None if held is None else held / MIB


def exposed_ms(events: Iterable[Any]) -> float:
    """How long the device does nothing but communicate."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    computing, all_of_it = covered(spans[False]), covered(spans[False] + spans[True])
    return (all_of_it - computing) / 1e3


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of what some intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def forget(stage: Stage) -> None:
    for parameter in stage.module.parameters():
        parameter.grad = None


def local(grad: Any) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def gradients(phases: Phases) -> list[Tensor]:
    dx, grads = run(phases)
    return [dx.clone(), *(local(grad).clone() for grad in grads)]


def most(value: float | None) -> float | None:
    """The largest of all ranks' values."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return None if None in values else max(values)


def compare(size: Size, layout: str, mesh: DeviceMesh, repeats: int) -> list[Result]:
    """Measure every system under a layout."""
    backend = "inductor" if mesh.device_type == "cuda" else "aten"
    systems: dict[str, tuple[bool, Callable[[Stage], Phases]]] = {
        "eager": (False, monolithic),
        "torch.compile": (True, monolithic),
        f"funcstage {backend}": (False, lambda stage: funcstage_phases(stage, backend=backend)),
        f"funcstage {backend}, I and W at once": (False, lambda stage: at_once(stage, backend=backend)),
    }
    found, reference = [], None
    for name, (compiled, phases_of) in systems.items():
        stage = stage_of(size, layout, mesh, compiled)
        phases = phases_of(stage)
        grads = gradients(phases)
        reference = grads if reference is None else reference
        error = relative_error(grads, [grad.double() for grad in reference])
        del grads
        totals, held, exposed = measure(stage, phases, repeats)
        low, _, high = statistics.quantiles(totals, n=4)
        found.append(
            Result(
                layout,
                name,
                most(statistics.median(totals)) or 0.0,
                most((high - low) / 2) or 0.0,
                most(held),
                most(exposed),
                most(error) or 0.0,
            )
        )
        del stage, phases
        gc.collect()
        torch.compiler.reset()
        if mesh.device_type == "cuda":
            torch.cuda.empty_cache()
    return found


def table(results: list[Result]) -> str:
    rows = [
        "| layout | system | total | held after F | exposed | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        held, exposed = ("" if v is None else f"{v:.1f}" for v in (r.held_after_forward_mib, r.exposed_ms))
        rows.append(
            f"| {r.layout} | {r.system} | {r.total_ms:.2f} ± {r.half_quartiles_ms:.2f} | {held} | {exposed} "
            f"| {r.relative_error:.1e} |"
        )
    return "\n".join(rows)


def join(device: str) -> None:
    """Join the processes that torchrun has started."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def leave(results: list[Any], report: str, file: Path | None) -> None:
    """Let the first rank print the report and write the results, and end the processes' group."""
    if dist.get_rank() == 0:
        print(report)
        if file:
            file.write_text(json.dumps([asdict(result) for result in results], indent=1))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="L", choices=SIZES)
    parser.add_argument("--layouts", default="tensor,fsdp")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    join(options.device)
    mesh = init_device_mesh(options.device, (dist.get_world_size(),))
    results = [
        result
        for layout in options.layouts.split(",")
        for result in compare(SIZES[options.size], layout, mesh, options.repeats)
    ]
    leave(results, table(results), options.json)


if __name__ == "__main__":
    main()
