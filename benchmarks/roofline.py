"""How far F, I and W are from what their matrix products and attention alone take on this device.

    python -m benchmarks.roofline --sizes L,M,S

The blocks are those of `benchmarks.split`. The products and attention of each phase are recorded as a CUDA
graph of their own, on random numbers, with nothing between them; what no order of operations can beat while
these kernels are used. Beside it F, I and W of funcstage, and forward and backward of `torch.compile`, both
as CUDA graphs; and what their kernels take by themselves, from a profile of each phase. Times in ms by
device events, medians; "rest" are all other kernels.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.split import (
    SIZES,
    Clock,
    Phases,
    Size,
    Stage,
    autograd_phases,
    funcstage_phases,
    isolated,
    make_stage,
    run,
    timed,
    warm_up,
)

PRODUCT = re.compile(r"gemm|nvjet|cutlass.*(?<!flash)_kernel|xmma|splitK|matmul|^triton_tem", re.IGNORECASE)
ATTENTION = re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)


class Floor(NamedTuple):
    """Milliseconds that a phase's products and its attention take alone."""

    products: float
    attention: float


def floors(size: Size, repeats: int) -> dict[str, Floor]:
    """What each phase has to compute, each kind recorded apart."""
    rows = size.batch * size.tokens
    shapes = [
        (size.width, 3 * size.width),
        (size.width, size.width),
        (size.width, 2 * size.hidden),
        (size.hidden, size.width),
    ]
    layers = [[_Product.of(rows, *shape) for shape in shapes] for _ in range(size.layers)]
    products = [product for layer in layers for product in layer]
    attended = [_Attention.of(size) for _ in range(size.layers)]
    attending = recorded_ms(lambda: [a.forward() for a in attended], repeats)
    there_and_back = recorded_ms(lambda: [a.forward_and_backward() for a in attended], repeats)
    return {
        "F": Floor(recorded_ms(lambda: [p.forward() for p in products], repeats), attending),
        "I": Floor(
            recorded_ms(lambda: [p.of_input() for p in products], repeats), there_and_back - attending
        ),
        "W": Floor(recorded_ms(lambda: [p.of_weight() for p in products], repeats), 0.0),
    }


class _Product(NamedTuple):
    x: Tensor
    weight: Tensor
    cotangent: Tensor

    @classmethod
    def of(cls, rows: int, width: int, out: int) -> _Product:
        x, weight, cotangent = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            for shape in [(rows, width), (out, width), (rows, out)]
        )
        return cls(x, weight / width**0.5, cotangent)

    def forward(self) -> Tensor:
        return self.x @ self.weight.t()

    def of_input(self) -> Tensor:
        return self.cotangent @ self.weight

    def of_weight(self) -> Tensor:
        return self.cotangent.t() @ self.x


class _Attention(NamedTuple):
    """Causal attention as the blocks lay it out, by the kernels that torch chooses for them."""

    inputs: tuple[Tensor, ...]
    cotangent: Tensor

    @classmethod
    def of(cls, size: Size) -> _Attention:
        shape = (size.batch, size.tokens, 3, size.heads, size.width // size.heads)
        inputs = torch.randn(shape, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        q, k, v = (each.detach().requires_grad_() for each in inputs)
        return cls((q, k, v), torch.randn_like(q))

    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.inputs, is_causal=True)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.cotangent)


def recorded_ms(work: Callable[[], object], repeats: int) -> float:
    """The median time of some work, recorded as a CUDA graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()  # so that no result takes another's memory
    clock, times = Clock("cuda"), []
    for _ in range(repeats):
        start = clock.mark()
        graph.replay()
        end = clock.mark()
        clock.sync()
        times.append(clock.between(start, end))
    del kept
    return statistics.median(times)


class Spent(NamedTuple):
    """Milliseconds of a phase: in all, and of its kernels by kind."""

    total: float
    kernels: dict[str, float]
    rest: Counter[str]


def spent(stage: Stage, phases: Phases, names: Iterable[str], repeats: int) -> dict[str, Spent]:
    """Time the phases in a row, then profile each."""
    clock = Clock("cuda")
    for _ in range(5):
        run(phases)
    totals = map(statistics.median, timed(stage, phases, clock, repeats).phases)
    found, state = {}, None
    for name, phase, total in zip(names, phases, totals, strict=True):
        clock.sync()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            state = phase() if state is None else phase(state)
            clock.sync()
        kinds: Counter[str] = Counter()
        rest: Counter[str] = Counter()
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = kind_of(event.name)
                kinds[kind] += event.device_time / 1e3
                if kind == "rest":
                    rest[event.name] += event.device_time / 1e3
        found[name] = Spent(total, dict(kinds), rest)
    return found


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    if ATTENTION.search(kernel):
        return "attention"
    return "products" if PRODUCT.search(kernel) else "rest"


def report(system: str, found: dict[str, Spent], floor: dict[str, Floor]) -> Iterable[str]:
    """Markdown rows; of `torch.compile`, backward stands for I and W."""
    for name, one in found.items():
        least = [floor[phase] for phase in ("IW" if name == "backward" else name[0].upper())]
        alone = [sum(kind) for kind in zip(*least, strict=True)]
        kernels = [one.kernels.get(kind, 0.0) for kind in ("products", "attention", "rest")]
        cells = [*alone, *kernels, one.total]
        yield (
            f"| {system} | {name} | "
            + " | ".join(f"{cell:.3f}" for cell in cells)
            + (f" | {one.total / sum(alone):.3f} |")
        )


HEAD = (
    "| system | phase | products alone | attention alone | its products | its attention | rest | in all "
    "| in all / alone |\n" + "| --- " * 9 + "|"
)


def systems(stage: Stage) -> Iterable[tuple[str, Sequence[str], Callable[[], Phases]]]:
    """Both as CUDA graphs, with the names of their phases."""
    yield "funcstage", "FIW", lambda: funcstage_phases(stage, backend="inductor", cuda_graphs=True)
    compiled = torch.compile(stage.module, mode="reduce-overhead")
    yield "torch.compile", ("forward", "backward"), lambda: autograd_phases(stage, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="L,M,S")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", action="store_true", help="also list the kernels of the rest")
    options = parser.parse_args()
    date = time.strftime("%Y-%m-%d")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date}; medians of {options.repeats}")
    for key in options.sizes.split(","):
        size = SIZES[key]
        stage = make_stage(size, "cuda")
        warm_up(stage)
        floor = floors(size, options.repeats)
        print(f"\n## {key}: {size}\n\n{HEAD}")
        for system, names, build in systems(stage):
            with isolated():
                found = spent(stage, build(), names, options.repeats)
                print(*report(system, found, floor), sep="\n", flush=True)
                if options.kernels:
                    for name, one in found.items():
                        for kernel, ms in one.rest.most_common():
                            print(f"    {system} {name} {ms:8.4f} {kernel[:150]}")


if __name__ == "__main__":
    main()
