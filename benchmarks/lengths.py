"""Calls of many lengths: how many traces they make, and what the first call of a length costs.

    python -m benchmarks.lengths [--backend aten|inductor] [--device cpu] [--lengths 20]

A stage of transformer layers gets one length after another, F, I and W each time, and the same lengths again;
beside it the same module under `torch.compile(dynamic=True)`, forward and backward. Timed is the first call
of each length behind the third, when everything is compiled, against the second call of the same length.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import funcstage as fs
from benchmarks.host_turns import Layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="inductor", choices=["aten", "inductor"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = nn.Sequential(Layer(), Layer()).to(options.device)
    lengths = torch.randperm(120)[: options.lengths].add(8).tolist()
    inputs = [torch.randn(2, n, 32, device=options.device) for n in lengths]
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend=options.backend)
    theirs = torch.compile(module, dynamic=True)

    def ours_step(x: Tensor) -> None:
        output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
        _, weight_pullback = pullback(output)
        weight_pullback()

    def their_step(x: Tensor) -> None:
        x = x.clone().requires_grad_()
        output = theirs(x)
        output.backward(output)

    print(f"torch {torch.__version__}, {options.device}, {options.backend}, {len(lengths)} lengths")
    for name, step in (("funcstage", ours_step), ("torch.compile(dynamic=True)", their_step)):
        first, again = timed(step, inputs), timed(step, inputs)
        new, old = (1e3 * statistics.median(times[3:]) for times in (first, again))
        print(
            f"{name}: first three calls {sum(first[:3]):.1f} s, a new length {new:.2f} ms, again {old:.2f} ms"
        )
    print(compiled)


def timed(step: Callable[[Tensor], None], inputs: list[Tensor]) -> list[float]:
    """Seconds of a step on each input."""
    times = []
    for x in inputs:
        start = time.perf_counter()
        step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
