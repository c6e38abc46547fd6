"""One pipeline stage, F + I + W: eager, `torch.compile`, torch's split and funcstage, side by side.

    python -m benchmarks.split --device cuda --sizes L,M,S
    python -m benchmarks.split --device cpu --sizes XS

Llama-style blocks in bfloat16. Times are medians by device events; relative errors are against the same
blocks in float64. All the ratios that are printed are within one run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import funcstage as fs
from funcstage.graph import CompiledStage
from funcstage.graph import compile as fs_compile


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


Phases = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any] | None]
"""F, I (or the whole backward) and W; each takes what the one before returned.

F returns (output, rest), I (input gradient, rest), and the last of them (input gradient, parameter
gradients).
"""


@dataclass
class Result:
    system: str
    total_ms: float
    forward_ms: float
    input_ms: float
    weight_ms: float
    host_ms: float
    peak_mib: float
    held_after_forward_mib: float
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

    return run_forward, run_backward, None


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
    apply, params, buffers = fs.functionalize(stage.module)
    fast: CompiledStage = fs_compile(apply, **options)

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

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0


def measure(
    name: str, stage: Stage, phases: Phases, clock: Clock, repeats: int, reference: list[Tensor], born: float
) -> Result:
    """Run F, I and W back to back `repeats` times; times are medians, memory is of the last run."""
    forward, backward, weight = phases

    def once(marks: list[Any]) -> tuple[Any, int, int | None]:
        marks.append(clock.mark())
        state = forward()
        marks.append(clock.mark())
        held = clock.allocated() - state[0].nbytes
        state = backward(state)
        marks.append(clock.mark())
        held_weight = getattr(state[1], "nbytes", None)
        if weight is not None:
            state = weight(state)
        marks.append(clock.mark())
        return state, held, held_weight

    result, _, _ = once([])
    clock.sync()
    first = time.perf_counter() - born
    error = relative_error([result[0], *result[1]], reference)
    del result
    for _ in range(5):
        once([])
    clock.sync()
    for p in stage.module.parameters():
        p.grad = None
    gc.collect()
    resting = clock.allocated()
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    rows, hosts = [], []
    held_forward, held_weight = 0, None
    for _ in range(repeats):
        clock.sync()
        marks: list[Any] = []
        start = time.perf_counter()
        result, held, held_weight = once(marks)
        hosts.append((time.perf_counter() - start) * 1e3)
        clock.sync()
        held_forward = held - resting
        del result
        steps = [clock.between(a, b) for a, b in itertools.pairwise(marks)]
        rows.append([*steps, clock.between(marks[0], marks[-1])])
        for p in stage.module.parameters():
            p.grad = None
    forward_ms, input_ms, weight_ms, total = (statistics.median(column) for column in zip(*rows, strict=True))
    mib = 2**20
    return Result(
        name,
        total,
        forward_ms,
        input_ms,
        weight_ms,
        statistics.median(hosts),
        (clock.peak() - resting) / mib,
        held_forward / mib,
        None if held_weight is None else held_weight / mib,
        first,
        error,
    )


def relative_error(grads: list[Tensor], reference: list[Tensor]) -> float:
    """The largest ||gradient - reference|| / ||reference|| of all gradients."""
    return max(((g - r).norm() / r.norm()).item() for g, r in zip(grads, reference, strict=True))


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def systems(stage: Stage, device: str) -> Iterator[tuple[str, Callable[[], Phases]]]:
    """Every system by name, with what builds it."""
    yield "eager", lambda: autograd_phases(stage, stage.module)
    yield "torch split", lambda: torch_split_phases(stage)
    yield "funcstage aten", lambda: funcstage_phases(stage, backend="aten")
    yield "torch.compile", lambda: autograd_phases(stage, torch.compile(stage.module))
    yield "funcstage inductor", lambda: funcstage_phases(stage, backend="inductor")
    if device == "cuda":
        yield (
            "torch.compile reduce-overhead",
            lambda: autograd_phases(stage, torch.compile(stage.module, mode="reduce-overhead")),
        )
        yield "funcstage graphs", lambda: funcstage_phases(stage, backend="inductor", cuda_graphs=True)


def ratios(size: Size, results: dict[str, Result]) -> dict[str, float]:
    """The ratios that issue and documentation speak of; what was not run is left out."""
    found = {}

    def ratio(name: str, ours: str, theirs: str, value: str = "total_ms") -> None:
        if ours in results and theirs in results and getattr(results[theirs], value):
            found[name] = getattr(results[ours], value) / getattr(results[theirs], value)

    ratio("inductor / torch.compile", "funcstage inductor", "torch.compile")
    ratio("graphs / reduce-overhead", "funcstage graphs", "torch.compile reduce-overhead")
    ratio("inductor / torch split", "funcstage inductor", "torch split")
    ratio("held after F / torch.compile", "funcstage inductor", "torch.compile", "held_after_forward_mib")
    ratio("peak / torch.compile", "funcstage inductor", "torch.compile", "peak_mib")
    ratio("time to first result / torch.compile", "funcstage inductor", "torch.compile", "first_result_s")
    held = results["funcstage inductor"].held_for_weight_mib if "funcstage inductor" in results else None
    if held is not None:
        found["held for W / matrix products' operands"] = held * 2**20 / size.matmul_bytes
    return found


def table(results: dict[str, Result]) -> str:
    lines = [
        "| system | total | F | I | W | host | peak MiB | held after F | held for W | first result | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results.values():
        weight = "" if r.held_for_weight_mib is None else f"{r.held_for_weight_mib:.1f}"
        lines.append(
            f"| {r.system} | {r.total_ms:.3f} | {r.forward_ms:.3f} | {r.input_ms:.3f} | {r.weight_ms:.3f} "
            f"| {r.host_ms:.3f} | {r.peak_mib:.1f} | {r.held_after_forward_mib:.1f} | {weight} "
            f"| {r.first_result_s:.1f} s | {r.relative_error:.1e} |"
        )
    return "\n".join(lines)


def trace_of_meta(layers: int = 80) -> dict[str, float]:
    """Trace and partition a stage of 70-billion-parameter-model size; nothing is allocated."""
    size = Size(8192, 28672, layers, 1, 4096, 64)
    with torch.device("meta"):
        module = nn.Sequential(*(Block(size) for _ in range(layers))).to(torch.bfloat16)
        x = torch.empty(size.batch, size.tokens, size.width, dtype=torch.bfloat16)
    apply, params, buffers = fs.functionalize(module)
    start = time.perf_counter()
    plan = fs_compile(apply, backend="aten").plan(params, buffers, x)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"layers": layers, "seconds": seconds, "peak_rss_gib": peak, "flops": plan.flops}


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
    clock = Clock(options.device)
    for key in options.sizes.split(","):
        size = SIZES[key]
        stage = make_stage(size, options.device)
        reference = float64_gradients(stage)
        results: dict[str, Result] = {}
        for name, build in systems(stage, options.device):
            if options.systems not in name:
                continue
            with fresh_dynamo():
                born = time.perf_counter()
                results[name] = measure(name, stage, build(), clock, options.repeats, reference, born)
        found = ratios(size, results)
        report["sizes"][key] = {"results": [asdict(r) for r in results.values()], "ratios": found}
        print(f"\n## {key}: {size}\n\n{table(results)}\n")
        for name, value in found.items():
            print(f"- {name}: {value:.3f}")
    if options.meta:
        report["meta"] = trace_of_meta(options.meta)
        print("\nTraced on the meta device:", report["meta"])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
