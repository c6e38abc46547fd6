"""A training step in a pipeline of several GPUs: torch's stages and funcstage's, under torch's schedules.

    python -m benchmarks.pipeline --sizes L,M --microbatches 4,8
    python -m benchmarks.pipeline --ranks 4 --microbatches 4,8,16
    python -m benchmarks.pipeline --device cpu --sizes XS --repeats 3 --ranks 4 --microbatches 4

Llama-style blocks in bfloat16, eight of them or two a rank if that is more, one sequence a microbatch,
mean-squared loss, one process a device. "Found" is what `find_schedule` makes of the measured costs.
What torch refuses (a compiled stage under a schedule that splits the backward) is left out. Step times are
medians by the host's clock around finished work; memory is that of the fuller rank; the bubble fraction is
the part of the step that lies outside the stages' actions, by device events, of the mean rank. "Simulated" is
`funcstage.pipelining.simulate` of the same order, with the costs that `measure_costs` finds when one device
runs the stages alone, and the time that an activation takes from one device to the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

import funcstage as fs
from benchmarks.split import Block, Clock, Size, relative_error
from funcstage.pipelining import (
    Costs,
    FunctionalPipelineStage,
    Order,
    ScheduleError,
    find_schedule,
    measure_costs,
    pipeline_order,
    simulate,
    write_order,
)
from funcstage.pipelining.transport.choice import Transport

SIZES = {
    "L": Size(4096, 11008, 8, 1, 4096, 32),
    "M": Size(1024, 2816, 8, 1, 1024, 16),
    "XS": Size(32, 88, 8, 1, 8, 2),
}


FOUND = "found"


class System(NamedTuple):
    """A kind of stage under a schedule.

    Attributes:
        name: for the table.
        schedule: torch's name of it; `FOUND` for one that is searched.
        chunks: stages a rank.
        stage: makes a stage of (module, index, number of stages, device).
        simulated: whether its step is simulated too.
    """

    name: str
    schedule: str
    chunks: int
    stage: Callable[[nn.Module, int, int, torch.device], Any]
    simulated: bool = False


@dataclass
class Result:
    system: str
    step_ms: float
    step_iqr_ms: float
    peak_mib: float
    bubble: float
    actions: dict[str, float]
    relative_error: float
    simulated_ms: float | None = None


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def theirs(module: nn.Module, index: int, n: int, device: torch.device) -> PipelineStage:
    return PipelineStage(module, index, n, device)


def theirs_compiled(module: nn.Module, index: int, n: int, device: torch.device) -> PipelineStage:
    module.compile()
    return PipelineStage(module, index, n, device)


def ours(
    transport: Transport = "auto", **options: Any
) -> Callable[[nn.Module, int, int, torch.device], FunctionalPipelineStage]:
    def make(module: nn.Module, index: int, n: int, device: torch.device) -> FunctionalPipelineStage:
        return FunctionalPipelineStage(
            module, index, n, device, compile=options, loss_fn=loss_fn, transport=transport
        )

    return make


def systems(device: str, size: Size) -> list[System]:
    backend = "inductor" if device == "cuda" else "aten"
    plain, graphs = ours(backend=backend), ours(backend=backend, cuda_graphs=True)
    found = [
        System("torch 1F1B, compiled", "1F1B", 1, theirs_compiled),
        System("torch Interleaved1F1B, compiled", "Interleaved1F1B", 2, theirs_compiled),
        System("torch ZBVZeroBubble, eager", "ZBVZeroBubble", 2, theirs),
        System("funcstage ZBVZeroBubble", "ZBVZeroBubble", 2, plain, True),
        System("funcstage InterleavedZeroBubble", "InterleavedZeroBubble", 2, plain, True),
        System("funcstage Interleaved1F1B", "Interleaved1F1B", 2, plain, True),
        System("funcstage DualPipeV", "DualPipeV", 2, plain, True),
        System("funcstage, found", FOUND, 2, plain, True),
    ]
    if device == "cuda" and size.width < 2048:  # what a large stage has in flight would not fit in pools
        found.append(System("funcstage ZBVZeroBubble, graphs", "ZBVZeroBubble", 2, graphs))
        found.append(System("funcstage Interleaved1F1B, graphs", "Interleaved1F1B", 2, graphs))
    return found


def size_of(key: str, world: int) -> Size:
    """A size, with a block for each of two stages a rank at least."""
    size = SIZES[key]
    return size._replace(layers=max(size.layers, 2 * world))


def blocks(size: Size, of: range, device: torch.device) -> nn.Sequential:
    """Some of the model's blocks, with the same weights wherever they are made."""
    parts = []
    for i in of:
        torch.manual_seed(i)
        parts.append(Block(size))
    return nn.Sequential(*parts).to(device, torch.bfloat16)


def reference_gradients(size: Size, x: Tensor, target: Tensor, microbatches: int) -> Tensor:
    """The first block's qkv gradient of the unpipelined model in float32, the mean over microbatches."""
    model = blocks(size, range(size.layers), x.device).float()
    for part, wanted in zip(x.float().chunk(microbatches), target.float().chunk(microbatches), strict=True):
        (loss_fn(model(part), wanted) / microbatches).backward()
    grad = model[0].qkv.weight.grad
    assert grad is not None
    return grad


class Timed:
    """Device events around every action of a stage."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: list[tuple[str, Any, Any]] = []

    def watch(self, stage: Any) -> None:
        for kind, name in (
            ("F", "forward_one_chunk"),
            ("B", "backward_one_chunk"),
            ("W", "backward_weight_one_chunk"),
        ):
            setattr(stage, name, self._timed(kind, getattr(stage, name)))

    def _timed(self, kind: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.mark()
            result = action(*args, **kwargs)
            self.spans.append((kind, start, self.clock.mark()))
            return result

        return run

    def totals(self) -> dict[str, float]:
        """Milliseconds by kind of action."""
        found: dict[str, float] = {}
        for kind, start, end in self.spans:
            found[kind] = found.get(kind, 0.0) + self.clock.between(start, end)
        return found


def order_of(system: System, microbatches: int, costs: list[Costs], comm: float) -> Order:
    """The order of a system's actions; every rank calls this, and rank 0 knows the costs."""
    world = dist.get_world_size()
    if system.schedule != FOUND:
        return pipeline_order(system.schedule, world * system.chunks, microbatches, num_ranks=world)
    found = [find_schedule(costs, world, microbatches, comm=comm) if costs else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def placed(system: System, size: Size, order: Order, device: torch.device) -> list[tuple[int, nn.Module]]:
    """This rank's parts of the model, by their places."""
    per_stage = size.layers // order.num_stages
    indices = order.stages_of(dist.get_rank())
    return [(i, blocks(size, range(i * per_stage, (i + 1) * per_stage), device)) for i in indices]


def schedule_of(system: System, order: Order, stages: list[Any]) -> Any:
    """The schedule of stages."""
    options = {"n_microbatches": order.num_microbatches, "loss_fn": loss_of(stages)}
    if system.schedule != FOUND:
        schedule_class: Any = get_schedule_class(system.schedule)
        return schedule_class(stages if system.chunks > 1 else stages[0], **options)
    schedule = _PipelineScheduleRuntime(stages, **options)
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        write_order(order, file.name)
        schedule._load_csv(file.name)
    return schedule


def step_of(
    schedule: Any, modules: list[tuple[int, nn.Module]], n: int, x: Tensor, target: Tensor
) -> Callable[[], None]:
    """A training step of this rank, with gradients made anew."""
    has_first, has_last = any(i == 0 for i, _ in modules), any(i == n - 1 for i, _ in modules)

    def step() -> None:
        for _, module in modules:
            module.zero_grad(set_to_none=True)
        schedule.step(
            *((x,) if has_first else ()), **({"target": target} if has_last else {}), return_outputs=False
        )

    return step


def error_of(modules: list[tuple[int, nn.Module]], expected: Tensor | None) -> float:
    """How far the first block's gradient is from the expected one, on the rank that knows it."""
    if expected is None:
        return 0.0
    block: Any = dict(modules)[0]
    return relative_error([block[0].qkv.weight.grad.float()], [expected])


def measure(
    system: System, size: Size, order: Order, repeats: int, device: torch.device, expected: Tensor | None
) -> Result:
    """Time a training step of one system; every rank calls this."""
    world, n = dist.get_world_size(), order.num_stages
    clock = Clock(device.type)
    modules = placed(system, size, order, device)
    stages = [system.stage(module, i, n, device) for i, module in modules]
    timed = Timed(clock)
    for stage in stages:
        timed.watch(stage)
    schedule = schedule_of(system, order, stages)
    step = step_of(schedule, modules, n, *batch(size, order.num_microbatches, device))
    for _ in range(4):
        step()
        clock.sync()
    error = error_of(modules, expected)
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, bubbles, actions = [], [], {}
    for _ in range(repeats):
        timed.spans.clear()
        clock.sync()
        dist.barrier()
        clock.sync()
        start = time.perf_counter()
        step()
        clock.sync()
        times.append((time.perf_counter() - start) * 1e3)
        actions = timed.totals()
        bubbles.append(1 - sum(actions.values()) / times[-1])
    quartiles = statistics.quantiles(times, n=4)
    mine = Result(
        system.name,
        statistics.median(times),
        quartiles[2] - quartiles[0],
        torch.cuda.max_memory_allocated() / 2**20 if clock.cuda else 0.0,
        statistics.median(bubbles),
        actions,
        error,
    )
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    mine.step_ms = max(r.step_ms for r in everyone)
    mine.peak_mib = max(r.peak_mib for r in everyone)
    mine.bubble = statistics.mean(r.bubble for r in everyone)
    return mine


def alone(size: Size, n: int, device: torch.device) -> list[Costs]:
    """What a microbatch costs each of n stages on one device that does nothing else."""
    per_stage = size.layers // n
    stages = []
    for i in range(n):
        stage = fs.functionalize(blocks(size, range(i * per_stage, (i + 1) * per_stage), device))
        backend = "inductor" if device.type == "cuda" else "aten"
        stages.append(stage._replace(apply=fs.compile(stage.apply, backend=backend)))
    return measure_costs(stages, loss_fn, *batch(size, 1, device), repeats=10)


def seconds_between(x: Tensor) -> float:
    """Half of what an activation takes to the next rank and back; every rank calls this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    clock, times = Clock(x.device.type), []
    for _ in range(12):
        clock.sync()
        dist.barrier()
        clock.sync()
        start = time.perf_counter()
        for sender, receiver in ((0, 1 % world), (1 % world, 0)):
            if rank == sender:
                dist.send(x, receiver)
            elif rank == receiver:
                dist.recv(x, sender)
        clock.sync()
        times.append((time.perf_counter() - start) / 2)
    return statistics.median(times[2:])


def loss_of(stages: list[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The schedule's loss function: of the last stage if it computes the loss itself."""
    own = [stage.loss_fn for stage in stages if stage.is_last and hasattr(stage, "loss_fn")]
    return own[0] if own else loss_fn


def batch(size: Size, microbatches: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100)
    x = torch.randn(microbatches, size.tokens, size.width, device=device, dtype=torch.bfloat16)
    return x, torch.randn_like(x)


def table(results: list[Result]) -> str:
    lines = [
        "| system | step, ms | IQR | simulated, ms | peak MiB | bubble | F, B or I, W of rank 0 | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        spans = " / ".join(f"{r.actions[kind]:.1f}" for kind in "FBW" if kind in r.actions)
        simulated = "" if r.simulated_ms is None else f"{r.simulated_ms:.2f}"
        lines.append(
            f"| {r.system} | {r.step_ms:.2f} | {r.step_iqr_ms:.2f} | {simulated} | {r.peak_mib:.0f} "
            f"| {r.bubble:.3f} | {spans} | {r.relative_error:.1e} |"
        )
    return "\n".join(lines)


def ratios(results: list[Result]) -> dict[str, float]:
    """Ours under ZBVZeroBubble against torch's."""
    by_name = {r.system: r for r in results}
    best_of_torch = min((r.step_ms for r in results if r.system.startswith("torch")), default=None)
    found = {}
    for r in results:
        if r.simulated_ms is not None:
            found[f"simulated / measured: {r.system}"] = r.simulated_ms / r.step_ms
        if best_of_torch is not None and r.system.startswith("funcstage ZBV"):
            found[f"{r.system} / best of torch's"] = r.step_ms / best_of_torch
            for name in ("torch ZBVZeroBubble, eager", "torch Interleaved1F1B, compiled"):
                if name in by_name:
                    found[f"{r.system} / {name}"] = r.step_ms / by_name[name].step_ms
                    if by_name[name].peak_mib:
                        found[f"peak: {r.system} / {name}"] = r.peak_mib / by_name[name].peak_mib
    return found


def run_rank(rank: int, world: int, address: str, options: argparse.Namespace) -> None:
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=address,
        rank=rank,
        world_size=world,
        device_id=device if cuda else None,
    )
    where = torch.cuda.get_device_name() if cuda else "CPU"
    report: dict[str, Any] = {"device": f"{world} x {where}", "torch": torch.__version__, "runs": []}
    report["date"] = time.strftime("%Y-%m-%d")
    for key in options.sizes.split(","):
        size = size_of(key, world)
        costs = alone(size, 2 * world, device) if rank == 0 else []
        comm = seconds_between(torch.randn(1, size.tokens, size.width, device=device, dtype=torch.bfloat16))
        if rank == 0:
            print(f"{key}: {comm * 1e3:.3f} ms between ranks; " + "; ".join(map(str, costs)), flush=True)
        for microbatches in map(int, options.microbatches.split(",")):
            expected = None
            if rank == 0:
                expected = reference_gradients(size, *batch(size, microbatches, device), microbatches)
            results = []
            for system in systems(options.device, size):
                if not (chosen(system.name, options) and is_possible(system, microbatches, world)):
                    continue
                torch._dynamo.reset()
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                order = order_of(system, microbatches, costs, comm)
                results.append(measure(system, size, order, options.repeats, device, expected))
                if rank == 0 and system.simulated:
                    results[-1].simulated_ms = simulate(order, costs, comm=comm).makespan * 1e3
                if rank == 0:
                    print(f"{key} m={microbatches}: {results[-1]}", flush=True)
            if rank == 0:
                report["runs"].append(told(key, microbatches, results, table(results), ratios(results)))
    if rank == 0:
        save(report, options.json)
    dist.destroy_process_group()


def chosen(name: str, options: argparse.Namespace) -> bool:
    """Whether a system is to run, by `--systems`."""
    return not options.systems or any(part in name for part in options.systems.split("|"))


def is_possible(system: System, microbatches: int, world: int) -> bool:
    """Whether the schedule takes so few microbatches."""
    try:
        if system.schedule != FOUND:
            pipeline_order(system.schedule, world * system.chunks, microbatches, num_ranks=world)
    except ScheduleError:
        return False
    return True


def told(
    size: str, microbatches: int, results: Sequence[Any], text: str, found: dict[str, float]
) -> dict[str, Any]:
    """Print the results of a size, and return them for the report."""
    print(f"\n## {size}, {microbatches} microbatches\n\n{text}\n")
    for name, value in found.items():
        print(f"- {name}: {value:.3f}", flush=True)
    runs = [asdict(result) for result in results]
    return {"size": size, "microbatches": microbatches, "results": runs, "ratios": found}


def save(report: dict[str, Any], path: str) -> None:
    """Write the report, if there is a path."""
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)


def parser_of(about: str, sizes: str, repeats: int) -> argparse.ArgumentParser:
    """The options that benchmarks of several ranks have in common."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", default=sizes)
    parser.add_argument("--microbatches", default="4,8")
    parser.add_argument("--systems", default="", help="parts of the names of those to run, separated by |")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", default="")
    return parser


def start(run_rank: Callable[..., None], options: argparse.Namespace) -> None:
    """Run all ranks in processes, which meet over TCP as under torchrun: a file is looked at every 10 ms."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(run_rank, (options.ranks, f"tcp://localhost:{port}", options), nprocs=options.ranks)


def main() -> None:
    parser = parser_of(__doc__ or "", "L,M", 15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    start(run_rank, parser.parse_args())


if __name__ == "__main__":
    main()
