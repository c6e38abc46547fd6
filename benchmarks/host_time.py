"""Host time of F, I and W on the closures engine, against eager forward and backward in the same run.

Small layers, so that what is measured is the work of the host and not of the kernels:

    python -m benchmarks.host_time [--layers 20] [--width 64] [--batch 32] [--device cpu] [--json FILE]

Eager and the three phases take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funcstage as fs


def measure(module: nn.Module, x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every repeat, by phase."""
    apply, params, buffers = fs.functionalize(module)
    weights = list(module.parameters())
    cotangent = torch.randn_like(module(x))
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(phase: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds[phase].append(time.perf_counter() - start)
        return result

    for _ in range(repeats):
        leaf = x.detach().requires_grad_()
        output = timed("eager forward", lambda leaf=leaf: module(leaf))
        timed(
            "eager backward",
            lambda output=output, leaf=leaf: torch.autograd.grad(output, [leaf, *weights], cotangent),
        )
        pullback = timed("F", lambda: fs.stage_vjp(apply, params, buffers, x)[2])
        weight_pullback = timed("I", lambda pullback=pullback: pullback(cotangent)[1])
        timed("W", weight_pullback)
    return seconds


def main() -> None:
    """Run the benchmark and print a table of medians with their quartiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
    module = nn.Sequential(*layers).to(args.device)
    x = torch.randn(args.batch, args.width, device=args.device)
    measure(module, x, 20)  # warm-up
    seconds = measure(module, x, args.repeats)

    print(f"torch {torch.__version__}, {args.device}, Python {platform.python_version()}")
    print(f"{args.layers} x Linear({args.width}, {args.width}), batch {args.batch}, {args.repeats} repeats")
    for phase, values in seconds.items():
        low, median, high = (q * 1e6 for q in statistics.quantiles(values, n=4))
        print(f"{phase:15s} {median:9.1f} us   (quartiles {low:.1f} to {high:.1f})")
    median = {phase: statistics.median(values) for phase, values in seconds.items()}
    eager = median["eager forward"] + median["eager backward"]
    ours = median["F"] + median["I"] + median["W"]
    print(f"F + I + W over eager forward + backward: {ours / eager:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "seconds": seconds}))


if __name__ == "__main__":
    main()
