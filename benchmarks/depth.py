"""Deep stages: what F, I and W take until the first result, and then, by the number of blocks.

    python -m benchmarks.depth [--backend inductor|aten] [--blocks 8 32] [--size S]

Llama-style blocks, compiled as repeated layers, as one program each, and by `torch.compile` block by block
(forward and backward). Each runs in a process of its own with one thread and an empty cache of Inductor's.
First results are in seconds of the processor, the compilers that were started included, as others may use
the machine, and by the clock; later ones are the best of many, of the processor as well.

`--meta 80` traces and divides a stage of a 70-billion-parameter model's size instead; nothing is allocated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import funcstage as fs
from benchmarks.split import SIZES, Block, Size, make_stage

SYSTEMS = ("repeated", "one program", "torch.compile")


def seconds() -> float:
    """Of the processor, for this process and those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def step_of(system: str, module: nn.Sequential, x: Tensor, backend: str) -> Callable[[], object]:
    """F, I and W of a stage, or forward and backward."""
    cotangent = torch.ones_like(x)
    if system == "torch.compile":
        for block in module:
            block.compile(backend="inductor" if backend == "inductor" else "aot_eager")
        leaves = [x.requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(module(x), leaves, cotangent)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend=backend, repeated=system == "repeated")  # type: ignore[arg-type]

    def step() -> object:
        _, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent)
        return dx, weight_pullback()

    return step


def measure(system: str, size: Size, backend: str, repeats: int) -> dict[str, float]:
    """What the first step takes, and the best of the later ones."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ["torch._inductor.compile_fx"] if backend == "inductor" else ["torch._dynamo"]:
        importlib.import_module(name)
    stage = make_stage(size, "cpu")
    step = step_of(system, stage.module.float(), stage.x.float(), backend)
    begin, at = seconds(), time.perf_counter()
    step()
    first, wall = seconds() - begin, time.perf_counter() - at
    later = []
    for _ in range(repeats):
        begin = seconds()
        step()
        later.append(seconds() - begin)
    return {"first": first, "wall": wall, "later": min(later)}


def in_a_process(system: str, options: argparse.Namespace, blocks: int) -> dict[str, float]:
    """Measure with an empty cache."""
    arguments = ["--system", system, "--backend", options.backend, "--size", options.size]
    arguments += ["--blocks", str(blocks), "--repeats", str(options.repeats)]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.depth", *arguments],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def trace_of_meta(layers: int) -> None:
    """Say how long a large stage takes until its programs are there as graphs."""
    size = Size(8192, 28672, layers, 1, 4096, 64)
    with torch.device("meta"):
        module = nn.Sequential(*(Block(size) for _ in range(layers))).to(torch.bfloat16)
        x = torch.empty(size.batch, size.tokens, size.width, dtype=torch.bfloat16)
    apply, params, buffers = fs.functionalize(module)
    begin = seconds()
    fs.compile(apply, backend="aten").plan(params, buffers, x)
    print(f"{layers} layers of width {size.width}: planned in {seconds() - begin:.1f} s of the processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="inductor", choices=["aten", "inductor"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", default="S", choices=[*SIZES])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--system", choices=SYSTEMS, help="measure this one alone, here")
    parser.add_argument("--meta", type=int, metavar="LAYERS")
    options = parser.parse_args()
    if options.meta is not None:
        trace_of_meta(options.meta)
        return
    if options.system is not None:
        size = SIZES[options.size]._replace(layers=options.blocks[0])
        print(json.dumps(measure(options.system, size, options.backend, options.repeats)))
        return
    print(f"torch {torch.__version__}, CPU, one thread, {options.backend}, size {options.size}")
    for blocks in options.blocks:
        for system in options.systems:
            found = in_a_process(system, options, blocks)
            first = f"first {found['first']:.1f} s ({found['wall']:.1f} s by the clock)"
            print(f"{blocks} blocks, {system}: {first}, then {1e3 * found['later']:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
