"""Host time of F, I and W of small stages, uncompiled and compiled, of several versions of funcstage in turn.

Each version runs in a process of its own, one at a time, so that whatever else the machine does falls on all
of them. What counts is the CPU time of the thread, as a core may be busy with something else:

    git archive <commit> funcstage | tar x -C /tmp/before
    python -m benchmarks.host_turns --trees /tmp/before . [--turns 8] [--repeats 30]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A transformer layer of ten modules."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_up = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(self.act(self.up(self.norm_up(x))))


def _layers(n: int) -> nn.Module:
    return nn.Sequential(*[layer for _ in range(n) for layer in (nn.Linear(16, 16), nn.GELU())])


STAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "4 modules": (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), (4, 16)),
    "transformer layer": (Layer, (2, 4, 32)),
    "41 modules": (lambda: _layers(20), (4, 16)),
}


def serve() -> None:
    """Time whatever is asked for on standard input, `[stage, engine, repeats]` a line."""
    import funcstage as fs

    torch.set_num_threads(1)
    made: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        stage, engine, repeats = json.loads(line)
        if (stage, engine) not in made:
            make, shape = STAGES[stage]
            module, x = make(), torch.randn(shape)
            apply, params, buffers = fs.functionalize(module)
            function = fs.compile(apply, backend="aten") if engine == "compiled" else apply
            made[stage, engine] = function, params, buffers, x, torch.randn_like(module(x))
        function, params, buffers, x, cotangent = made[stage, engine]
        times = []
        gc.collect()
        gc.disable()
        for _ in range(repeats):
            marks = [time.thread_time_ns()]
            _, _, pullback = fs.stage_vjp(function, params, buffers, x)
            marks.append(time.thread_time_ns())
            _, weight_pullback = pullback(cotangent)
            marks.append(time.thread_time_ns())
            weight_pullback()
            marks.append(time.thread_time_ns())
            times.append([(end - start) / 1e3 for start, end in itertools.pairwise(marks)])
        gc.enable()
        print(json.dumps(times), flush=True)


def main() -> None:
    """Run the benchmark and print medians and lower deciles in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trees", nargs="+", default=["."], help="folders with a package funcstage in them")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()

    script = str(Path(__file__).resolve())
    servers = [
        subprocess.Popen(
            [sys.executable, script, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(tree).resolve())},
        )
        for tree in args.trees
    ]

    def ask(server: Any, *question: Any) -> list[list[float]]:
        server.stdin.write(json.dumps(question) + "\n")
        server.stdin.flush()
        times: list[list[float]] = json.loads(server.stdout.readline())
        return times

    print(f"torch {torch.__version__}; {args.turns} turns of {args.repeats}; median (lower decile), us")
    for engine in ("uncompiled", "compiled"):
        for stage in STAGES:
            times: dict[str, list[list[float]]] = {tree: [] for tree in args.trees}
            for turn in range(args.turns + 1):
                for server, found in zip(servers, times.values(), strict=True):
                    new = ask(server, stage, engine, args.repeats)
                    found += new if turn else []  # the first turn warms up
            for tree, found in times.items():
                cells = [
                    f"{name} {statistics.median(phase):7.1f} ({sorted(phase)[len(phase) // 10]:7.1f})"
                    for name, phase in zip("FIW", zip(*found, strict=True), strict=True)
                ]
                print(f"{engine:10s}  {stage:18s} {tree:20s} {'  '.join(cells)}", flush=True)
    for server in servers:
        server.terminate()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
