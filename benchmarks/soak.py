"""Does a stage stay as fast and as small as it was? Many microbatches, threads and signatures.

    python -m benchmarks.soak --engine aten

Times are of the host: F, I and W of a stage whose kernels are small. Memory is the process's resident set,
and on CUDA what is allocated there.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funcstage as fs

WINDOWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("closures", "aten", "inductor"), default="aten")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--microbatches", type=int, default=100_000)
    parser.add_argument("--signatures", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.engine} on {options.device}, torch {torch.__version__}")
    print(microbatches(stage(options), options))
    print(in_threads(stage(options), options))
    if options.engine == "aten":
        print(signatures(stage(options), options))


def stage(options: argparse.Namespace) -> Callable[[int], list[Tensor]]:
    """A stage, as a function that runs a microbatch of some size whole."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16)).to(
        options.device
    )
    apply, params, buffers = fs.functionalize(module)
    engine: Any = apply if options.engine == "closures" else fs.compile(apply, backend=options.engine)

    def run(size: int) -> list[Tensor]:
        output, _, pullback = fs.stage_vjp(
            engine, params, buffers, torch.ones(size, 16, device=options.device)
        )
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return [output, dx, *weight_pullback().values()]

    return run


def microbatches(run: Callable[[int], list[Tensor]], options: argparse.Namespace) -> str:
    """Run one microbatch after the other; compare the first windows with the last."""
    for _ in range(100):
        run(8)
    count = options.microbatches // WINDOWS
    times, memory = [], []
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(count):
            run(8)
        times.append((time.perf_counter() - start) / count * 1e6)
        memory.append(nbytes(options.device))
    third = WINDOWS // 3
    first, last = statistics.median(times[:third]), statistics.median(times[-third:])
    return (
        f"{count * WINDOWS} microbatches: {first:.1f} us at first, {last:.1f} us at last "
        f"({min(times):.1f} to {max(times):.1f}); {memory[0] / 2**20:.1f} MiB after a window, "
        f"{memory[-1] / 2**20:.1f} MiB at last"
    )


def in_threads(run: Callable[[int], list[Tensor]], options: argparse.Namespace) -> str:
    """Run the same in several threads, and compare every result with the first one."""
    expected = run(8)
    count = max(1, options.microbatches // 10 // options.threads)

    def work(_: int) -> int:
        wrong = 0
        for _ in range(count):
            wrong += not all(map(torch.equal, run(8), expected))
        return wrong

    start = time.perf_counter()
    with ThreadPoolExecutor(options.threads) as pool:
        wrong = sum(pool.map(work, range(options.threads)))
    each = (time.perf_counter() - start) / (count * options.threads) * 1e6
    total = count * options.threads
    return f"{options.threads} threads: {total} microbatches, {each:.1f} us each, {wrong} differ"


def signatures(run: Callable[[int], list[Tensor]], options: argparse.Namespace) -> str:
    """Trace one signature after the other."""
    warnings.simplefilter("ignore")
    memory = []
    start = time.perf_counter()
    for i in range(options.signatures):
        run(i + 1)
        if (i + 1) % (options.signatures // 4) == 0:
            memory.append(f"{nbytes(options.device) / 2**20:.0f}")
    each = (time.perf_counter() - start) / options.signatures * 1e3
    return f"{options.signatures} signatures: {each:.1f} ms each, {', '.join(memory)} MiB after each quarter"


def nbytes(device: str) -> int:
    """What is in use: on the device, or by the process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
