"""One pipeline stage, F + I + W: eager, `torch.compile`, torch's split and funcstage, side by side.

    python -m benchmarks.split --device cuda --sizes L,M,S
    python -m benchmarks.split --device cpu --sizes XS

Llama-style blocks in bfloat16, and the same in JAX where that is installed. What the columns say:

- total, F, I, W: milliseconds by device events, medians; after ± half the distance of the quartiles. Where
  there is no W, I is the whole backward. JAX's are by the host's clock around finished work, and its F, I and
  W in runs of their own, each finished before the next.
- host: until the last of them was enqueued.
- peak: allocated above the resting state. Empty for CUDA graphs, whose private pools it does not show.
- reserved: what the allocator has taken from the device since before the system was built, when it has run
  for a while and what was unused after warming up was given back. Private pools are in it. The allocator
  takes 2 MiB or 20 MiB and more at a time.
- held after F: without the output; for W: what the pullback says. With CUDA graphs and on a CPU both are
  what the pullback says, in JAX the closure's arrays less the parameters.
- first result: from nothing, with an empty cache of compiled code for each system; libraries, the compilers'
  imports and their worker processes are warm.
- error: the largest `||gradient - float64|| / ||float64||` of all gradients.

All the ratios that are printed are within one run. `--meta 80` traces a stage of a model of 70 billion
parameters, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import funcstage as fs
from funcstage.engines.base import StageCall
from funcstage.engines.graph import compile as fs_compile
from funcstage.engines.graph.decompose import DECOMPOSED, decompose
from funcstage.engines.graph.partition import partition
from funcstage.engines.graph.plan import plan_of
from funcstage.engines.graph.trace import trace


class Size(NamedTuple):
    width: int
    hidden: int
    layers: int
    batch: int
    tokens: int
    heads: int

    @property
    def matmul_bytes(self) -> int:
        """The matrix products' inputs and cotangents in bfloat16, once each."""
        per_token = 8 * self.width + 3 * self.hidden
        return 2 * per_token * self.batch * self.tokens * self.layers


SIZES = {
    "L": Size(4096, 11008, 2, 1, 4096, 32),
    "M": Size(1024, 2816, 4, 4, 1024, 16),
    "S": Size(256, 704, 4, 4, 128, 4),
    "XS": Size(64, 176, 1, 2, 16, 2),
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.RMSNorm(size.width)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, tokens, width))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@dataclass
class Stage:
    """What every system is given."""

    module: nn.Sequential
    x: Tensor
    cotangent: Tensor


Phases = tuple[Callable[..., Any], ...]
"""F, then I and W or the whole backward; each takes what the one before returned.

F returns (output, rest), I (input gradient, rest), and the last of them (input gradient, parameter
gradients).
"""


@dataclass
class Result:
    """What was measured of one system; `None` where it has no such phase or memory cannot be seen."""

    system: str
    total_ms: float
    total_quartiles_ms: tuple[float, float]
    total_range_ms: tuple[float, float]
    forward_ms: float | None
    input_ms: float | None
    weight_ms: float | None
    host_ms: float
    peak_mib: float | None
    reserved_mib: float | None
    held_after_forward_mib: float | None
    held_for_weight_mib: float | None
    first_result_s: float
    relative_error: float


def make_stage(size: Size, device: str) -> Stage:
    torch.manual_seed(0)
    module = nn.Sequential(*(Block(size) for _ in range(size.layers))).to(device, torch.bfloat16)
    x = torch.randn(size.batch, size.tokens, size.width, device=device, dtype=torch.bfloat16)
    return Stage(module, x, torch.randn_like(x))


def float64_gradients(stage: Stage) -> list[Tensor]:
    """The gradients of the same numbers, in float64 throughout."""
    module = copy.deepcopy(stage.module).double()
    x = stage.x.double().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(module(x), [x, *module.parameters()], stage.cotangent.double())
    return list(grads)


def autograd_phases(stage: Stage, forward: Callable[[Tensor], Tensor]) -> Phases:
    """Monolithic: the backward is one phase."""
    params = list(stage.module.parameters())

    def run_forward() -> tuple[Tensor, Tensor]:
        for p in params:
            p.grad = None
        x = stage.x.detach().requires_grad_()
        return forward(x), x

    def run_backward(state: tuple[Tensor, Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        y, x = state
        y.backward(stage.cotangent)
        return x.grad, [p.grad for p in params]

    return run_forward, run_backward


def torch_split_phases(stage: Stage) -> Phases:
    """torch.distributed.pipelining's split of the eager tape."""
    params = list(stage.module.parameters())

    def run_forward() -> tuple[Tensor, Tensor]:
        for p in params:
            p.grad = None
        x = stage.x.detach().requires_grad_()
        return stage.module(x), x

    def run_input(state: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Any]:
        y, x = state
        (dx,), groups = stage_backward_input([y], [stage.cotangent], [x], iter(params))
        return dx, groups

    def run_weight(state: tuple[Tensor | None, Any]) -> tuple[Tensor | None, list[Tensor | None]]:
        dx, groups = state
        stage_backward_weight(iter(params), groups)
        return dx, [p.grad for p in params]

    return run_forward, run_input, run_weight


def funcstage_phases(stage: Stage, **options: Any) -> Phases:
    """Compiled with these options, or by the closures engine where there are none."""
    apply, params, buffers = fs.functionalize(stage.module)
    fast = fs_compile(apply, **options) if options else apply

    def run_forward() -> Any:
        y, _, pullback = fs.stage_vjp(fast, params, buffers, stage.x)
        return y, pullback

    def run_input(state: Any) -> Any:
        (dx,), weight_pullback = state[1](stage.cotangent)
        return dx, weight_pullback

    def run_weight(state: Any) -> tuple[Tensor, list[Tensor]]:
        return state[0], list(state[1]().values())

    return run_forward, run_input, run_weight


class Clock:
    """Marks in time: device events, or the host's clock where there is no device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        """Milliseconds; after `sync`."""
        return a.elapsed_time(b) if self.cuda else (b - a) * 1e3

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Memory(NamedTuple):
    """MiB of device memory, above the resting state."""

    peak: float | None
    reserved: float | None
    held_after_forward: float | None
    held_for_weight: float | None


MIB = 2**20


def measure(
    name: str, stage: Stage, build: Callable[[], Phases], graphs: bool, repeats: int, reference: list[Tensor]
) -> Result:
    """Build a system and run F, I and W back to back; phases follow each other without waiting."""
    clock = Clock(stage.x.device.type)
    forget_gradients(stage)  # which may lie in the memory of the system before
    release()
    reserved = reserved_bytes(stage)
    born = time.perf_counter()
    phases = build()
    result = run(phases)
    clock.sync()
    first = time.perf_counter() - born
    error = relative_error([result[0], *result[1]], reference)
    del result
    for _ in range(5):
        run(phases)
    forget_gradients(stage)
    release()  # what only the compilation needed, so that `reserved` is what it takes to go on running
    for _ in range(2):
        run(phases)
    totals, hosts, steps = timed(stage, phases, clock, repeats)
    forward_ms, input_ms, *weight_ms = map(statistics.median, steps)
    memory = measure_memory(stage, phases, graphs, reserved)
    return Result(
        name,
        **spread(totals),
        forward_ms=forward_ms,
        input_ms=input_ms,
        weight_ms=weight_ms[0] if weight_ms else None,
        host_ms=statistics.median(hosts),
        peak_mib=memory.peak,
        reserved_mib=memory.reserved,
        held_after_forward_mib=memory.held_after_forward,
        held_for_weight_mib=memory.held_for_weight,
        first_result_s=first,
        relative_error=error,
    )


def run(phases: Phases, between: Callable[[Any], None] = lambda state: None) -> Any:
    """F, I and W; `between` is called with the state before, between and after them."""
    state = None
    between(state)
    for phase in phases:
        state = phase() if state is None else phase(state)
        between(state)
    return state


class Times(NamedTuple):
    """Milliseconds of each run: in all, of the host, and of each phase."""

    totals: list[float]
    hosts: list[float]
    phases: list[tuple[float, ...]]


def timed(stage: Stage, phases: Phases, clock: Clock, repeats: int) -> Times:
    """Run the phases back to back, which nothing of the run before disturbs."""
    totals, hosts, steps = [], [], []
    for _ in range(repeats):
        forget_gradients(stage)
        clock.sync()
        marks: list[Any] = []
        start = time.perf_counter()
        result = run(phases, lambda _, marks=marks: marks.append(clock.mark()))
        hosts.append((time.perf_counter() - start) * 1e3)
        clock.sync()
        del result
        totals.append(clock.between(marks[0], marks[-1]))
        steps.append([clock.between(a, b) for a, b in itertools.pairwise(marks)])
    return Times(totals, hosts, [*zip(*steps, strict=True)])


def measure_memory(stage: Stage, phases: Phases, graphs: bool, reserved_before: int) -> Memory:
    """What the allocator counts in one run, apart from the timed ones, as counting takes time.

    The memory of CUDA graphs lies in private pools, whose blocks count as allocated all the time or never.
    So no peak is given there, and what our pullbacks hold is what they say themselves.
    """
    held: list[tuple[float | None, float | None]] = []
    visible = stage.x.is_cuda and not graphs
    forget_gradients(stage)
    gc.collect()
    resting = torch.cuda.memory_allocated() if visible else 0
    if visible:
        torch.cuda.reset_peak_memory_stats()

    def look(state: Any) -> None:
        if state is None:
            return
        counted = (torch.cuda.memory_allocated() - resting - state[0].nbytes) / MIB if visible else None
        said = state[1].nbytes / MIB if isinstance(state[1], fs.Pullback | fs.WeightPullback) else None
        held.append((counted, said))

    run(phases, look)
    (after_forward, pullback), (_, weight_pullback) = held[:2]
    return Memory(
        (torch.cuda.max_memory_allocated() - resting) / MIB if visible else None,
        (reserved_bytes(stage) - reserved_before) / MIB if stage.x.is_cuda else None,
        pullback if after_forward is None else after_forward,
        weight_pullback,
    )


def reserved_bytes(stage: Stage) -> int:
    """What the allocator has taken from the device: the pools of CUDA graphs are in it."""
    return torch.cuda.memory_reserved() if stage.x.is_cuda else 0


def forget_gradients(stage: Stage) -> None:
    for p in stage.module.parameters():
        p.grad = None


def spread(totals: Sequence[float]) -> dict[str, Any]:
    """The median with its quartiles and its range, as `Result` names them."""
    low, median, high = statistics.quantiles(totals, n=4, method="inclusive")
    return {
        "total_ms": median,
        "total_quartiles_ms": (low, high),
        "total_range_ms": (min(totals), max(totals)),
    }


def relative_error(grads: list[Tensor], reference: list[Tensor]) -> float:
    """The largest ||gradient - reference|| / ||reference|| of all gradients."""
    return max(((g - r).norm() / r.norm()).item() for g, r in zip(grads, reference, strict=True))


def release() -> None:
    """Give unused device memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def isolated() -> Iterator[None]:
    """An empty cache of compiled code, on disk and in the process, and no device memory of those before."""
    torch._dynamo.reset()
    release()
    if torch.cuda.is_available():  # Triton is compiled in a pool of processes, which sleeps between uses
        AsyncCompile.wakeup()
        AsyncCompile.wait_pool_ready()
    with fresh_cache():
        yield
    torch._dynamo.reset()
    release()


def warm_up(stage: Stage) -> None:
    """Pay what would fall to whichever system comes first, and to no other after it.

    That is the kernels of torch's own libraries at these shapes, the import of the compilers and the start
    of Inductor's pool of processes, for which both compilers run on something small of another shape.
    """
    run(autograd_phases(stage, stage.module))
    module = nn.Sequential(nn.RMSNorm(24), nn.Linear(24, 24)).to(stage.x.device, stage.x.dtype)
    x = stage.x.new_ones(8, 24)
    small = Stage(module, x, torch.ones_like(x))
    run(autograd_phases(small, torch.compile(module)))
    run(funcstage_phases(small, backend="inductor"))


class System(NamedTuple):
    name: str
    build: Callable[[], Phases]
    graphs: bool = False


def systems(stage: Stage) -> Iterator[System]:
    """All that is measured in this process."""
    yield System("eager", lambda: autograd_phases(stage, stage.module))
    yield System("torch split", lambda: torch_split_phases(stage))
    yield System("funcstage aten", lambda: funcstage_phases(stage, backend="aten"))
    yield System("torch.compile", lambda: autograd_phases(stage, torch.compile(stage.module)))
    yield System("funcstage inductor", lambda: funcstage_phases(stage, backend="inductor"))
    if stage.x.is_cuda:
        yield System(
            "torch.compile reduce-overhead",
            lambda: autograd_phases(stage, torch.compile(stage.module, mode="reduce-overhead")),
            graphs=True,
        )
        yield System(
            "funcstage graphs",
            lambda: funcstage_phases(stage, backend="inductor", cuda_graphs=True),
            graphs=True,
        )


JAX_SYSTEMS = ("JAX monolithic", "JAX split")


def measure_jax(
    name: str, stage: Stage, heads: int, repeats: int, reference: list[Tensor]
) -> tuple[Result, str]:
    """Run `benchmarks.split_jax` on the stage's numbers: return what it measured, and JAX's version."""
    state = {**dict(stage.module.named_parameters()), "x": stage.x, "cotangent": stage.cotangent}
    on_cuda = stage.x.is_cuda
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process keeps its memory
        "JAX_PLATFORMS": "cuda" if on_cuda else "cpu",
    }
    with TemporaryDirectory() as folder:
        bits = {key: value.detach().view(torch.int16).cpu().numpy() for key, value in state.items()}
        numpy.savez(f"{folder}/numbers.npz", **bits)
        command = [sys.executable, "-m", "benchmarks.split_jax", folder, name]
        command += ["--heads", str(heads), "--repeats", str(repeats)]
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        figures = json.loads(Path(folder, "figures.json").read_text())
        with numpy.load(f"{folder}/gradients.npz") as file:
            names = ["x", *dict(stage.module.named_parameters())]
            grads = [torch.from_numpy(file[key]).to(stage.x.device) for key in names]
    version = figures.pop("jax")
    totals = figures.pop("totals_ms")
    error = relative_error(grads, reference)
    return Result(
        name, **spread(totals), **figures, peak_mib=None, reserved_mib=None, relative_error=error
    ), version


def ratios(size: Size, results: dict[str, Result]) -> dict[str, float]:
    """The ratios that issue and documentation speak of; what was not run is left out."""
    found = {}

    def ratio(name: str, ours: str, theirs: str, value: str = "total_ms") -> None:
        if ours in results and theirs in results:
            numerator, denominator = getattr(results[ours], value), getattr(results[theirs], value)
            if numerator is not None and denominator:
                found[name] = numerator / denominator

    ratio("inductor / torch.compile", "funcstage inductor", "torch.compile")
    ratio("graphs / reduce-overhead", "funcstage graphs", "torch.compile reduce-overhead")
    ratio("inductor / torch split", "funcstage inductor", "torch split")
    ratio("held after F / torch.compile", "funcstage inductor", "torch.compile", "held_after_forward_mib")
    ratio("peak / torch.compile", "funcstage inductor", "torch.compile", "peak_mib")
    ratio("reserved / torch.compile", "funcstage inductor", "torch.compile", "reserved_mib")
    ratio(
        "reserved, graphs / reduce-overhead",
        "funcstage graphs",
        "torch.compile reduce-overhead",
        "reserved_mib",
    )
    ratio("inductor / JAX split", "funcstage inductor", "JAX split")
    ratio("graphs / JAX split", "funcstage graphs", "JAX split")
    ratio("time to first result / torch.compile", "funcstage inductor", "torch.compile", "first_result_s")
    held = results["funcstage inductor"].held_for_weight_mib if "funcstage inductor" in results else None
    if held is not None:
        found["held for W / matrix products' operands"] = held * MIB / size.matmul_bytes
    return found


def table(results: dict[str, Result]) -> str:
    """Markdown; a cell is empty where there is nothing to tell."""
    lines = [
        "| system | total | F | I | W | host | peak MiB | reserved MiB | held after F | held for W "
        "| first result | error |",
        "| --- " * 12 + "|",
    ]
    for r in results.values():
        low, high = r.total_quartiles_ms
        times = [r.forward_ms, r.input_ms, r.weight_ms, r.host_ms]
        memory = [r.peak_mib, r.reserved_mib, r.held_after_forward_mib, r.held_for_weight_mib]
        cells = [
            r.system,
            f"{r.total_ms:.3f} ±{(high - low) / 2:.3f}",
            *("" if value is None else f"{value:.3f}" for value in times),
            *("" if value is None else f"{value:.{1 if value > 10 else 3}f}" for value in memory),
            f"{r.first_result_s:.1f} s",
            f"{r.relative_error:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trace_of_meta(layers: int = 80) -> dict[str, float]:
    """Trace and partition a stage of 70-billion-parameter-model size; nothing is allocated.

    To be run in a process of its own, whose peak memory is then that of tracing.
    """
    size = Size(8192, 28672, layers, 1, 4096, 64)
    with torch.device("meta"):
        module = nn.Sequential(*(Block(size) for _ in range(layers))).to(torch.bfloat16)
        x = torch.empty(size.batch, size.tokens, size.width, dtype=torch.bfloat16)
    apply, params, buffers = fs.functionalize(module)
    imported = peak_rss_gib()
    marks = [time.perf_counter()]
    joint = trace(StageCall.of(apply, params, buffers, (x,), {}, [0]), DECOMPOSED, copied=False)
    marks.append(time.perf_counter())
    separated = decompose(joint)
    marks.append(time.perf_counter())
    parts = partition(separated, "min_cut")
    marks.append(time.perf_counter())
    traced, separating, partitioned = (b - a for a, b in itertools.pairwise(marks))
    return {
        "layers": layers,
        "nodes": len(separated.module.graph.nodes),
        "trace_s": traced,
        "separate_s": separating,
        "partition_s": partitioned,
        "peak_rss_gib": peak_rss_gib(),
        "rss_before_gib": imported,
        "weights_gib": sum(p.nbytes for p in params.values()) / 2**30,
        "flops": plan_of("meta", joint, parts).flops,
    }


def peak_rss_gib() -> float:
    """Of this process alone: `getrusage` would carry the peak of the process that started it over."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="L,M,S")
    parser.add_argument("--systems", default="", help="a part of the names of those to run; all if empty")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--meta", type=int, default=0, help="also trace a stage of so many layers of width 8192"
    )
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    date = time.strftime("%Y-%m-%d")
    report: dict[str, Any] = {"device": where, "torch": torch.__version__, "date": date, "sizes": {}}
    print(f"{where}, torch {torch.__version__}, {date}; times in ms, medians of {options.repeats}")
    for key in filter(None, options.sizes.split(",")):
        size = SIZES[key]
        results = measure_size(size, options.device, options.systems, options.repeats, report)
        found = ratios(size, results)
        report["sizes"][key] = {"results": [asdict(r) for r in results.values()], "ratios": found}
        print(f"\n## {key}: {size}\n\n{table(results)}\n")
        for name, value in found.items():
            print(f"- {name}: {value:.3f}")
    if options.meta:
        with get_context("spawn").Pool(1) as pool:
            report["meta"] = pool.apply(trace_of_meta, (options.meta,))
        print("\nTraced on the meta device:", report["meta"])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


def measure_size(
    size: Size, device: str, chosen: str, repeats: int, report: dict[str, Any]
) -> dict[str, Result]:
    """Run every system whose name has `chosen` as a part; JAX, if it is installed, comes last."""
    stage = make_stage(size, device)
    reference = float64_gradients(stage)
    warm_up(stage)
    results: dict[str, Result] = {}
    for name, build, graphs in systems(stage):
        if chosen in name:
            with isolated():
                results[name] = measure(name, stage, build, graphs, repeats, reference)
    if importlib.util.find_spec("jax") is not None:
        for name in filter(lambda name: chosen in name, JAX_SYSTEMS):
            try:
                results[name], report["jax"] = measure_jax(name, stage, size.heads, repeats, reference)
            except subprocess.CalledProcessError as error:  # say so, and keep what was measured
                print(f"{name} failed: {error.stderr[-2000:]}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
